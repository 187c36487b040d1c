"""Feeds targets to a coverage-guided fuzzer: ``python -m tests.fuzz.run --seconds 3600 [TARGET ...]``.

Each target gets its share of the time in a process of its own. An exception that is none of our errors is written to
the folder of findings, once for each place it comes from, and the fuzzer goes on. Exit code 1 if there were any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HOW = "atheris is not installed. It is not among the test packages for it needs a clang runtime: pip install atheris"


def main() -> int:
    """Fuzz each target in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="names in tests/fuzz/targets.py; default: all")
    parser.add_argument("--seconds", type=int, default=600, help="of all targets together")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for what was found")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the one target of this process
    arguments = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print(HOW, file=sys.stderr)
        return 2
    if arguments.only:
        fuzz(arguments.only, seconds=arguments.seconds, findings=arguments.findings)
    from tests.fuzz.targets import TARGETS

    names = arguments.targets or list(TARGETS)
    failed = False
    for name in names:
        started_s = time.monotonic()
        command = [sys.executable, "-m", "tests.fuzz.run", "--only", name, "--findings", str(arguments.findings)]
        # The fuzzer ends its process where it stands: what it has written is removed from here.
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
            done = subprocess.run(
                [*command, "--seconds", str(arguments.seconds // len(names))],
                capture_output=True,
                text=True,
                env={**os.environ, "TMPDIR": scratch},
                check=False,
            )
        folder = arguments.findings / name
        found = sorted(path.name for path in folder.glob("*.txt")) if folder.is_dir() else []
        runs = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        failed = failed or bool(found) or not runs
        print(
            f"{name}: {int(runs[-1]) if runs else 0:,} executions in {time.monotonic() - started_s:.0f} s, "
            f"coverage {covered[0] if covered else '?'} -> {covered[-1] if covered else '?'}, "
            f"{len(found)} findings {' '.join(found)}" + ("" if runs else f"\n{done.stderr[-2000:]}"),
            flush=True,
        )
    return int(failed)


def fuzz(name: str, *, seconds: int, findings: Path) -> None:
    """Fuzz one target until the time is over; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["dist_lora"]):
        from tests.fuzz.targets import TARGETS, make_ground, mend
    logging.disable(logging.CRITICAL)
    target, folder = TARGETS[name], findings / name
    scratch = Path(tempfile.mkdtemp())
    ground = make_ground(scratch / "ground")
    mend(ground)
    corpus = scratch / "corpus"
    corpus.mkdir()
    words: set[bytes] = set()
    for number, seed in enumerate(target.seeds(ground)):
        (corpus / f"seed-{number}").write_bytes(seed)
        words |= {word for word in re.findall(rb'"[^"\\]{1,60}"|[A-Za-z_]{3,40}', seed)}
        assert target.outcome(ground, seed) is None or seed.startswith(b"\0\0"), f"seed {number} of {name} is not sound"
    words |= {b"null", b"true", b"1e999", b"NaN", b"[]", b"{}", b"..", b"9223372036854775808", b"-1", b'"\\ud800"'}
    dictionary = scratch / "words"
    dictionary.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in sorted(words)))

    def feed(data: bytes) -> None:
        try:
            target.outcome(ground, data)
        except BaseException as error:  # a library's panic is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            _note(folder, data, error)

    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=20000", "-timeout=30",
               "-rss_limit_mb=3000", f"-dict={dictionary}", f"-artifact_prefix={folder}/"]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    atheris.Setup([sys.argv[0], *options, str(corpus)], feed)
    with contextlib.suppress(SystemExit):
        atheris.Fuzz()
    os._exit(0)


def _note(folder: Path, data: bytes, error: BaseException) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "dist_lora/" in frame.filename]
    place = [(frame.filename.rpartition("dist_lora/")[2], frame.lineno) for frame in ours[-1:]]
    key = hashlib.sha256(json.dumps([type(error).__name__, place]).encode()).hexdigest()[:8]
    text = folder / f"{type(error).__name__}-{key}.txt"
    if not text.exists():
        text.with_suffix(".input").write_bytes(data)
        text.write_text("".join(traceback.format_exception(error)), errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
