"""Makes the quickstart's data: requests in plain words, each answered by exactly one JSON tool call.

    python launch/quickstart_data.py --out .cache/quickstart --seed 0

writes DIR/train.jsonl and DIR/eval.jsonl, one sample per line, in the messages format. The held-out requests use the
phrasings of the training set, but none of its values: no name, city, number or time of eval.jsonl is an argument in
train.jsonl. So the evaluation measures reading a request, not remembering one.

The same arguments give the same bytes. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 4  # every fourth value is kept for eval.jsonl
MOST_TRIES = 1000  # for values that give a request not made before

Value = str | int
Sample = dict[str, list[dict[str, str]]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _pairs(first: str, second: str) -> tuple[str, ...]:
    return tuple(f"{one} {other}" for one in _words(first) for other in _words(second))


# The pools are large compared to the 384 samples: a model that sees a value ten times memorizes it, one that sees it
# once learns to copy. No text is in two pools, and a number is on the same side in all, so that held-out values are
# never seen in training.
POOLS: Mapping[str, Sequence[Value]] = {
    "minutes": range(2, 90),
    "amount": range(105, 1000),
    "quantity": range(2, 50),
    "clock": tuple(f"{hour:02}:{minute:02}" for hour in range(7, 22) for minute in range(0, 60, 5)),
    "day": tuple(f"{month} {day}" for month in ("March", "April", "June", "October") for day in range(2, 29)),
    "label": _words(
        "pasta, tea, laundry, pizza, eggs, yoga, rice, cookies, homework, break, soup, bread, coffee,"
        " stretching, oven, potatoes, reading, dishes, meditation, chicken, piano, lasagna, walk, face"
        " mask, muffins, parking, dough, shower, painting, beans, charger, noodles, roast, chess, plants,"
        " sauna, fish, pancakes, washing, ironing"
    ),
    "person": _words(
        "Anna, Ben, Clara, David, Emma, Frank, Grace, Henry, Ivy, Jack, Karen, Liam, Mia, Noah, Olivia,"
        " Peter, Quinn, Rosa, Sam, Tina, Uma, Victor, Wendy, Xavier, Yara, Zoe, Martin, Julia, Oscar,"
        " Nina, Paul, Laura, Simon, Helen, George, Alice, Robert, Diana, Thomas, Sarah, Kevin, Maria,"
        " Daniel, Lucy, Eric, Sophie, Felix, Ruth"
    ),
    "text": _pairs(
        "the car, the package, the cake, the report, the ticket, the garden, the phone, the train, the bike, the key",
        "is ready, is gone, looks great, was found, is broken, is too small, came back today",
    ),
    "city": _words(
        "Paris, London, Berlin, Madrid, Rome, Vienna, Lisbon, Dublin, Oslo, Helsinki, Prague, Warsaw,"
        " Athens, Cairo, Tokyo, Sydney, Toronto, Chicago, Boston, Seattle, Denver, Miami, Nairobi,"
        " Mumbai, Bangkok, Seoul, Lima, Zurich, Geneva, Munich, Hamburg, Venice, Naples, Barcelona,"
        " Houston, Dallas, Montreal, Dubai, Delhi, Milan, Brussels, Stockholm, Budapest, Singapore,"
        " Manila, Havana, Portland, Atlanta"
    ),
    "title": _pairs(
        "team, family, board, morning, project, school, budget, music, garden",
        "lunch, meeting, party, review, lesson, visit, workshop",
    ),
    "currency": _words(
        "dollars, euros, pounds, yen, francs, pesos, rupees, kroner, dinars, rubles, rand, lira, won, baht, yuan, kuna"
    ),
    "artist": _words(
        "Mozart, Adele, Miles Davis, Queen, Bach, Madonna, Bob Marley, Coldplay, Nina Simone, Elvis,"
        " Beethoven, Radiohead, Abba, Prince, Chopin, Johnny Cash, Pink Floyd, Vivaldi, Drake, David"
        " Bowie, Shakira, Sting, Rihanna, Santana, Metallica, Blondie, Tina Turner, Bob Dylan, Elton"
        " John, Nirvana, Oasis, Eminem, Cher, Beyonce, Aerosmith, Genesis, Ray Charles, Norah Jones,"
        " Frank Sinatra, Phil Collins"
    ),
    "room": _words(
        "kitchen, bedroom, living room, bathroom, office, garage, hallway, basement, attic, cellar,"
        " nursery, library, dining room, guest room, balcony, studio, gym, barn, workshop, lobby"
    ),
    "item": _pairs(
        "red, small, large, fresh, cheap, green, sweet",
        "apples, candles, tomatoes, pencils, onions, bananas, lemons, plates, cups",
    ),
}


@dataclass(frozen=True)
class Tool:
    """A tool: its arguments, each with the pool that its values come from, and the ways to ask for it."""

    name: str
    arguments: Mapping[str, str]  # argument -> pool, in the order of the answer
    phrasings: tuple[str, ...]


TOOLS: tuple[Tool, ...] = (
    Tool(
        "set_timer",
        {"minutes": "minutes", "label": "label"},
        (
            "Set a timer for {minutes} minutes for the {label}.",
            "Please start a {minutes} minute timer called {label}.",
            "I need {minutes} minutes on the clock for {label}.",
            "Remind me in {minutes} minutes about the {label}.",
            "Timer: {label}, {minutes} minutes.",
        ),
    ),
    Tool(
        "get_weather",
        {"city": "city", "day": "day"},
        (
            "What will the weather be like in {city} on {day}?",
            "Is it going to rain on {day} in {city}?",
            "Tell me the forecast for {city} on {day}.",
            "Do I need a coat in {city} on {day}?",
            "How warm does it get on {day} in {city}?",
        ),
    ),
    Tool(
        "send_message",
        {"to": "person", "text": "text"},
        (
            "Tell {to} that {text}.",
            "Send a message to {to} saying: {text}.",
            "Write to {to}: {text}.",
            "Let {to} know: {text}.",
            "Could you text {to} this: {text}.",
        ),
    ),
    Tool(
        "create_event",
        {"title": "title", "time": "clock"},
        (
            "Put {title} in my calendar at {time}.",
            "Schedule the {title} for {time}.",
            "I have a {title} at {time}, please note it.",
            "Add an event at {time}: {title}.",
            "Please book {time} for the {title}.",
        ),
    ),
    Tool(
        "convert_currency",
        {"amount": "amount", "source": "currency", "target": "currency"},
        (
            "How much is {amount} {source} in {target}?",
            "Convert {amount} {source} to {target}.",
            "What do I get in {target} for {amount} {source}?",
            "Change {amount} {source} into {target}, please.",
            "I have {amount} {source}. How many {target} is that?",
        ),
    ),
    Tool(
        "play_music",
        {"artist": "artist", "room": "room"},
        (
            "Play {artist} in the {room}.",
            "I would like to hear {artist} in the {room}.",
            "Put on some {artist} in the {room}, please.",
            "Start music by {artist} on the {room} speaker.",
            "Can we listen to {artist} in the {room}?",
        ),
    ),
    Tool(
        "add_to_list",
        {"item": "item", "quantity": "quantity"},
        (
            "Add {quantity} {item} to the shopping list.",
            "We need {quantity} {item}.",
            "Put {quantity} {item} on my list.",
            "Please remember to buy {quantity} {item}.",
            "Write down {item}, {quantity} of them.",
        ),
    ),
)


SYSTEM = f"Answer with one JSON call of a tool: {', '.join(tool.name for tool in TOOLS)}."


def make_samples(num_samples: int, *, held_out: bool, seed: int) -> list[Sample]:
    """Distinct requests with their answers, all phrasings in turn, all values from one side of every pool.

    Args:
        num_samples: how many; all differ in their request.
        held_out: whether to use the values kept for the evaluation.
        seed: another seed gives other requests.

    Exits with a message if the pools don't have that many distinct requests.
    """
    # A string as seed: Python hashes it with SHA-512, the same on every machine and in every process.
    rng = random.Random(f"{seed}/{'eval' if held_out else 'train'}")
    samples: dict[str, Sample] = {}
    for tool, phrasing in itertools.islice(_in_turn(rng), num_samples):
        for _ in range(MOST_TRIES):
            request, call = _ask(tool, phrasing, rng=rng, held_out=held_out)
            if request not in samples:
                break
        else:
            sys.exit(f"quickstart_data: {len(samples)} distinct requests exist; ask for fewer")
        samples[request] = _sample(request, call)
    return list(samples.values())


def values_of(pool: str, *, held_out: bool) -> list[Value]:
    """The values of a pool that are for the evaluation (``held_out``) or for training."""
    return [value for index, value in enumerate(POOLS[pool]) if _is_held_out(value, index) == held_out]


def write_data(folder: Path, *, seed: int, num_train: int, num_eval: int) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl to a folder (made if missing); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    train = make_samples(num_train, held_out=False, seed=seed)
    held_out = make_samples(num_eval, held_out=True, seed=seed)
    both = arguments_of(train) & arguments_of(held_out)
    assert not both, f"values of the training set are in the evaluation too: {sorted(map(str, both))}"
    return (
        _write_lines(folder / "train.jsonl", train),
        _write_lines(folder / "eval.jsonl", held_out),
    )


def arguments_of(samples: Sequence[Sample]) -> set[Value]:
    """Every value that the answers of some samples pass to a tool."""
    calls = (json.loads(sample["messages"][-1]["content"]) for sample in samples)
    return {value for call in calls for value in call["arguments"].values()}


def _is_held_out(value: Value, index: int) -> bool:
    number = value if isinstance(value, int) else index
    return number % HELD_OUT_SHARE == HELD_OUT_SHARE - 1


def _in_turn(rng: random.Random) -> Iterator[tuple[Tool, str]]:
    """Every tool with each of its phrasings, in rounds of random order: none is rare by chance."""
    ways = [(tool, phrasing) for tool in TOOLS for phrasing in tool.phrasings]
    while True:
        yield from rng.sample(ways, len(ways))


def _ask(tool: Tool, phrasing: str, *, rng: random.Random, held_out: bool) -> tuple[str, dict[str, object]]:
    arguments: dict[str, Value] = {}
    for name, pool in tool.arguments.items():
        free = [value for value in values_of(pool, held_out=held_out) if value not in arguments.values()]
        arguments[name] = rng.choice(free)
    return phrasing.format(**arguments), {"name": tool.name, "arguments": arguments}


def _sample(request: str, call: dict[str, object]) -> Sample:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": request},
            {"role": "assistant", "content": json.dumps(call)},
        ]
    }


def _write_lines(path: Path, samples: Sequence[Sample]) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return path


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="Makes the quickstart's requests and their tool calls.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the two files")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other requests (0)")
    parser.add_argument("--train", type=int, default=384, metavar="N", help="requests to learn from (384)")
    parser.add_argument("--eval", type=int, default=40, metavar="N", help="held-out requests (40)")
    arguments = parser.parse_args()
    train, held_out = write_data(arguments.out, seed=arguments.seed, num_train=arguments.train, num_eval=arguments.eval)
    print(f"made {arguments.train} requests in {train} and {arguments.eval} held-out ones in {held_out}")


if __name__ == "__main__":
    main()
