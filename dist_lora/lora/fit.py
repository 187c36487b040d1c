"""Whether an adapter on disk is the one that a config attaches to a model: checked by its headers alone."""

from __future__ import annotations

from dist_lora.config.schema import LoraSection
from dist_lora.errors import AdapterError
from dist_lora.herd.shape import Shape, module_path
from dist_lora.lora.adapter_reader import AdapterOnDisk
from dist_lora.text import first_few


def check_fit(adapter: AdapterOnDisk, *, section: LoraSection, shape: Shape) -> None:
    """Raise ``AdapterError`` unless the adapter's tensors and scale are exactly those that ``section`` attaches.

    The error names the tensors that are missing, unexpected, or of another shape.
    """
    expected = _shapes(section, shape)
    shapes = {
        f"{module}.lora_{half}": tensor.shape
        for module, pair in adapter.pairs.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    differing = [
        f"{name} (found {shapes[name]}, expected {expected[name]})"
        for name in expected
        if name in shapes and shapes[name] != expected[name]
    ]
    kinds = (
        ("missing", [name for name in expected if name not in shapes]),
        ("unexpected", [name for name in shapes if name not in expected]),
        ("of another shape", differing),
    )
    faults = [f"{kind}: {first_few(names)}" for kind, names in kinds if names]
    scale = section.alpha / section.rank
    if not faults and adapter.scale != scale:
        faults = [f"its B A is scaled by {adapter.scale:g}, the config's alpha / rank is {scale:g}"]
    if faults:
        raise AdapterError(
            f"{adapter.folder} is not the adapter that lora.targets, lora.layers, lora.rank and lora.alpha define:\n  "
            + "\n  ".join(faults)
        )


def _shapes(section: LoraSection, shape: Shape) -> dict[str, tuple[int, int]]:
    shapes = {}
    for layer in section.layer_indices(shape.num_layers):
        for target in section.target_names():
            rows, columns = shape.linear_shapes()[target]
            name = module_path(target, layer=layer)
            shapes[f"{name}.lora_A"] = (section.rank, columns)
            shapes[f"{name}.lora_B"] = (rows, section.rank)
    return shapes
