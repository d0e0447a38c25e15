"""Rules on the graph as a whole: its opset, files, inputs and their sizes."""

from collections.abc import Iterator, Mapping, Sequence

from compress.lint.graph import Finding, Graph, Rule, Shapes, Version, is_external, name_of, type_name

NEWEST_OPSET: Mapping[Version, int] = {(10, 0): 24, (8, 5): 17}  # from this version on; 24 as of 10.15
PER_CHANNEL_OPSET = 13
FP16_SCALE_OPSET = 19


def opset(graph: Graph) -> Iterator[Finding]:
    """The version of the operators is one that the parser reads, and new enough for the Q/DQ."""
    newest = next(newest for version, newest in NEWEST_OPSET.items() if graph.version >= version)
    if graph.opset > newest:
        what = f"opset {graph.opset}; {graph.reader} reads up to {newest}"
        yield Finding("opset", graph.name, what, f"Convert it to opset {newest}, or take a newer TensorRT.")
    quantizers = list(graph.quantizers())
    if quantizers and graph.opset < PER_CHANNEL_OPSET:
        what = f"Q/DQ at opset {graph.opset}, which has no scales per channel"
        yield Finding("opset", name_of(quantizers[0]), what, f"Export again with opset {PER_CHANNEL_OPSET} or later.")
    for node in quantizers if graph.opset < FP16_SCALE_OPSET else ():
        scale = graph.tensors.get(node.input[1])
        if scale is not None and type_name(scale.data_type) == "FLOAT16":
            what = f"an FP16 scale at opset {graph.opset}, which has FP32 scales only"
            yield Finding("opset", name_of(node), what, f"Convert to opset {FP16_SCALE_OPSET} before the cast to FP16.")


def external_data(graph: Graph) -> Iterator[Finding]:
    """Every weight is there."""
    for name, tensor in graph.tensors.items():
        if is_external(tensor):
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "no file")
            what = f"its content lies in {location}, which is not beside the graph or cannot be read"
            yield Finding("external-data", name, what, "Copy that file along, or save the graph as one file.")


def inputs(graph: Graph) -> Iterator[Finding]:
    """Inputs have names and ranks."""
    for i, value in enumerate(graph.inputs):
        if not value.name:
            yield Finding("input", f"input {i}", "it has no name", "Name it: profiles and bindings go by names.")
        elif not value.type.tensor_type.HasField("shape"):
            what = "its number of axes is not told"
            yield Finding("input", value.name, what, "Write its shape, with names for the axes that vary.")


def profile(graph: Graph) -> Iterator[Finding]:
    """The optimization profile covers every input whose size varies."""
    known = [value.name for value in graph.inputs]
    for name in sorted(graph.profile.keys() - set(known)):
        yield Finding("profile", name, "the profile has it, the graph has no such input", f"It has {', '.join(known)}.")
    for value in graph.inputs:
        if not value.name or not value.type.tensor_type.HasField("shape"):
            continue  # found already
        axes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]  # 0 where it varies
        shapes = graph.profile.get(value.name)
        if shapes is not None:
            yield from uncovered(value.name, axes, shapes)
        elif 0 in axes:
            what = (
                f"its axes {', '.join(str(i) for i, size in enumerate(axes) if not size)} vary, and it has no profile"
            )
            yield Finding("profile", value.name, what, "Give its smallest, typical and largest shape.")


def uncovered(name: str, axes: Sequence[int], shapes: Shapes) -> Iterator[Finding]:
    """Axes of an input that its profile cannot cover."""
    wrong = sorted({len(shape) for shape in shapes} - {len(axes)})
    if wrong:
        what = f"it has {len(axes)} axes; shapes of the profile have {' and '.join(map(str, wrong))}"
        yield Finding("profile", name, what, "Give one size for each axis.")
        return
    for i, (size, low, typical, high) in enumerate(zip(axes, *shapes, strict=True)):
        if not 1 <= low <= typical <= high:
            what = f"axis {i} is {low}, {typical} and {high} in the profile; 1 <= min <= opt <= max must hold"
            yield Finding("profile", name, what, "Put the sizes in order.")
        elif size and not low == typical == high == size:
            what = f"axis {i} is {size} in the graph, and {low}, {typical} and {high} in the profile"
            yield Finding("profile", name, what, f"Give {size} for it, or export the graph with that axis free.")


RULES: Sequence[Rule] = (opset, external_data, inputs, profile)
