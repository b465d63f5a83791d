"""The built-in models: parameter counts by hand, structure, argument checks, the catalogue."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedlean.layers import BatchNorm, GroupNorm
from fedlean.models import catalog
from fedlean.models.resnet import resnet8, resnet18
from fedlean.spec import ModelSpec

# Every model of the catalogue: input, classes, parameters counted by hand.
MODELS = {
    "lenet300": ((1, 28, 28), 10, 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
    "mlp": ((1, 8, 8), 10, 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10),
    "mlp_40_20": ((1, 8, 8), 10, 64 * 40 + 40 + 40 * 20 + 20 + 20 * 10 + 10),
    "mlp_27_14": ((1, 28, 28), 10, 784 * 27 + 27 + 27 * 14 + 14 + 14 * 10 + 10),
    "mlp_13_7": ((1, 8, 8), 10, 64 * 13 + 13 + 13 * 7 + 7 + 7 * 10 + 10),
    # convolutions 200 + 8 and 3,200 + 16 with norms 2 * (8 + 16); 400-120-84-10
    "lenet5": ((1, 28, 28), 10, 3_472 + 400 * 120 + 120 + 120 * 84 + 84 + 85 * 10),
    "lenet5_small": ((1, 28, 28), 10, 936 + 200 * 48 + 48 + 48 * 32 + 32 + 33 * 10),
    "conv2": ((1, 28, 28), 62, 6_603_710),  # PruneFL: 52,096 + 6,551,614
    "vgg11": (
        (3, 32, 32),
        10,
        # 9.2M of convolutions + 530K of fully connected layers in the paper
        (1_792 + 73_856 + 295_168 + 590_080 + 1_180_160 + 3 * 2_359_808) + 530_442,
    ),
    # stem 432 + 32; stage 1: 2 * (2,304 + 32); stage 2: 4,608 + 9,216 + 512 + 3 * 64;
    # stage 3: 18,432 + 36,864 + 2,048 + 3 * 128; head 650
    "resnet8": ((3, 32, 32), 10, 464 + 4_672 + 14_528 + 57_728 + 650),
    # two more blocks per stage: 2 * (4,672 + 2 * (9,216 + 64) + 2 * (36,864 + 128))
    "resnet20": ((3, 32, 32), 10, 78_042 + 2 * (4_672 + 18_560 + 73_984)),
    # PruneFL's, 11.23M.  Stem 64 * 3 * 49 + 128; stage 1: 4 * (36,864 + 128); stages 2 to 4, with
    # c = 128, 256, 512: 9 c²/2 + 3 * 9 c² + c²/2 in convolutions, 5 * 2 c in norms; head 513 * 100
    "resnet18": (
        (3, 168, 168),
        100,
        9_536 + 147_968 + 525_568 + 2_099_712 + 8_393_728 + 51_300,
    ),
    # 3, 4, 6 and 3 blocks.  Stem 64 * 27 + 128; stage 1: 6 * (36,864 + 128); stages 2 to 4 of n
    # blocks: 9 c²/2 + (2n - 1) * 9 c² + c²/2 in convolutions, (2n + 1) * 2 c in norms; 513 * 10
    "resnet34": (
        (3, 32, 32),
        10,
        (1_856 + 221_952 + 5_130)
        + (68 * 128**2 + 9 * 256)
        + (104 * 256**2 + 13 * 512)
        + (50 * 512**2 + 7 * 1024),
    ),
    # VGG-11's convolutions, and five of equal channels more: 64, 128, 256 and two of 512
    "vgg16": (
        (3, 32, 32),
        10,
        9_750_922 + 36_928 + 147_584 + 590_080 + 2 * 2_359_808,
    ),
    # PruneFL's, 927,008 + 592,898.  Stem, 11 units (the sum of each in test_residual_models), last
    # convolution, fully connected layers
    "mobilenetv3_small": (
        (3, 84, 84),
        2,
        (464 + 744 + 3_864 + 5_416 + 13_736 + 2 * 57_264 + 21_968 + 29_800)
        + (91_848 + 2 * 294_096 + 56_448)
        + (576 * 1024 + 1024 + 1024 * 2 + 2),
    ),
}


def build(name: str) -> ModelSpec:
    shape, classes, _ = MODELS[name]
    return catalog.build(name, shape, classes)


def test_the_catalogue_lists_exactly_the_models_with_a_line_each():
    assert list(catalog.available()) == sorted(MODELS)
    assert all(len(line) > 20 for line in catalog.available().values())


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name: str):
    assert build(name).num_params == MODELS[name][2]
    assert build(name).output_shape == (MODELS[name][1],)


@pytest.mark.parametrize("name", MODELS)
def test_json_round_trip_keeps_spec_text_and_hash(name: str):
    spec = build(name)
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()
    assert again.hash == spec.hash == build(name).hash


HASHES = {  # of ten classes: wire, checkpoints and run folders name a spec so
    "conv2": ((1, 28, 28), "d99e709bbdc29135017b5345a3de8fd6"),
    "lenet300": ((1, 28, 28), "0541635df28c2fecc2bba39431f25d5b"),
    "lenet5": ((1, 28, 28), "a4661cc34270868e971768cf4436c43b"),
    "lenet5_small": ((1, 28, 28), "95db9f0d48c4c92b861415e3124536ad"),
    "mlp": ((1, 28, 28), "325f3bd73ceb99330077bbbeef8892aa"),
    "mlp_13_7": ((1, 28, 28), "1faa2ff6928c6781f59cd8475edbf9c7"),
    "mlp_27_14": ((1, 28, 28), "38201d965d126478cb5109a06b826547"),
    "mlp_40_20": ((1, 28, 28), "e95e19179bb09dd9ef550fcb4cb4ccc2"),
    "mobilenetv3_small": ((3, 32, 32), "014add8de537e7429457d59f4c4416a9"),
    "resnet18": ((3, 32, 32), "b98e68a9de998e55ef3be5ae9c9b7c25"),
    "resnet20": ((3, 32, 32), "609dbbad4d5d779359966bb1341401c4"),
    "resnet34": ((3, 32, 32), "cb5ee7ae6b9b2249864a8cb37c309163"),
    "resnet8": ((3, 32, 32), "57d28bad675b2bade833536df0d93632"),
    "vgg11": ((3, 32, 32), "523152b34eec73e3cfd5d2b10a8d673b"),
    "vgg16": ((3, 32, 32), "18ef496a61b141a7b9d9671e490c68bd"),
}


@pytest.mark.parametrize("name", MODELS)
def test_hashes_stay_what_they_are(name: str):
    """A change here breaks stored runs: they then belong to another model than they say."""
    shape, expected = HASHES[name]
    assert catalog.build(name, shape, 10).hash == expected


def test_hashes_tell_models_apart():
    assert build("conv2").hash != build("lenet300").hash
    assert catalog.build("conv2", (1, 28, 28), 61).hash != build("conv2").hash
    code = "from fedlean.models.catalog import build; print(build('conv2', (1, 28, 28), 62).hash)"
    assert _python(code) == build("conv2").hash


def test_blocks_are_stages():
    assert list(build("conv2").blocks) == ["conv1", "conv2", "fc1", "fc2"]
    assert list(build("lenet300").blocks) == ["fc1", "fc2", "fc3"]
    stages = [f"stage{n}" for n in range(1, 6)]
    assert list(build("vgg11").blocks) == [*stages, "fc1", "fc2", "fc3"]
    assert list(build("vgg16").blocks) == [*stages, "fc1", "fc2", "fc3"]
    convolutions = [name for name in build("vgg16").by_name if name.startswith("conv")]
    assert len(convolutions) == 13  # with three fully connected layers the 16 of its name
    assert list(build("resnet8").blocks) == ["stem", "stage1", "stage2", "stage3", "head"]


def test_conv2_names_its_layers_as_the_paper_does():
    assert [node.name for node in build("conv2").weighted] == ["conv1", "conv2", "fc1", "fc2"]


def test_resnet_shortcuts_are_not_prunable():
    spec = build("resnet20")
    kept = [node.name for node in spec.weighted if not node.prunable]
    assert kept == ["stage2_1_down", "stage3_1_down"]
    assert len(spec.prunable) == 20  # the layers that give the model its name


def test_resnet_norm():
    group, batch = (resnet8((3, 32, 32), 10, norm=norm) for norm in ("group", "batch"))
    for spec, kind in ((group, GroupNorm), (batch, BatchNorm)):
        norms = [node for node in spec.nodes if node.name.endswith(("norm", "norm1", "norm2"))]
        assert len(norms) == 9 and all(isinstance(node.layer, kind) for node in norms)
    assert group.num_params == batch.num_params
    with pytest.raises(ValueError, match="norm must be 'group' or 'batch', got 'layer'"):
        resnet8((3, 32, 32), 10, norm="layer")  # type: ignore[arg-type]


VECTORS = {"lenet300", "mlp", "mlp_40_20", "mlp_27_14", "mlp_13_7"}  # read them, too


@pytest.mark.parametrize("classes", [1, 0, -3, True, 2.0, "10"])
@pytest.mark.parametrize("name", MODELS)
def test_bad_classes(name: str, classes: object):
    with pytest.raises(ValueError, match="classes must be an integer of at least 2"):
        catalog.build(name, MODELS[name][0], classes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(MODELS.keys() - VECTORS))
def test_models_for_images_say_so(name: str):
    with pytest.raises(ValueError, match=rf"{name} reads images.*got \(784,\)"):
        catalog.build(name, (784,), 10)


def test_a_too_small_image_names_the_layer():
    with pytest.raises(ValueError, match=r"'pool5' .*window 2 does not fit an input side of 1"):
        catalog.build("vgg11", (3, 28, 28), 10)
    with pytest.raises(ValueError, match="'pool2'"):
        catalog.build("conv2", (1, 3, 3), 10)


@pytest.mark.parametrize("shape", [(), (0, 8, 8), (1, -8, 8), (1, 8.0, 8), (True, 8, 8)])
def test_bad_input_shapes(shape: tuple):
    with pytest.raises(ValueError, match="input_shape"):
        catalog.build("lenet300", shape, 10)


def test_unknown_names_propose_the_nearest():
    with pytest.raises(ValueError, match="unknown model 'resnet56': did you mean resnet"):
        catalog.build("resnet56", (3, 32, 32), 10)
    with pytest.raises(ValueError, match="'Conv-2': did you mean conv2"):
        catalog.build("Conv-2", (3, 32, 32), 10)
    with pytest.raises(ValueError, match="there are conv2, lenet300, lenet5, lenet5_small, mlp, "):
        catalog.build("zzz", (3, 32, 32), 10)


def test_options_after_a_name():
    """As the function takes them; names of tensors stay."""
    spec = catalog.build("resnet18,blocks=unit,width=8", (3, 32, 32), 10)
    assert spec == resnet18((3, 32, 32), 10, blocks="unit", width=8)
    assert len(spec.blocks) == 10 and spec.shapes["stage4_2_relu2"] == (64, 4, 4)
    plain = catalog.build("resnet18, width=8", (3, 32, 32), 10)
    assert plain.tensor_shapes == spec.tensor_shapes and plain.hash != spec.hash
    own = catalog.build("fedlean.models.resnet:resnet8,norm=batch", (3, 32, 32), 10)
    assert own == resnet8((3, 32, 32), 10, norm="batch")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18,block=unit", "'resnet18' has no option 'block=unit'; .* norm, blocks, width"),
        ("resnet18,blocks", "option 'blocks' of model 'resnet18' has no value"),
        ("resnet18 blocks=unit", "options follow a name after a comma"),
        ("resnet18,unit", "has no option 'unit'; expected name=value with one of norm"),
        ("resnet18,", "has no option ''"),
        ("resnet18,blocks=units", "blocks must be one of stage, unit, got 'units'"),
        ("resnet18,width=wide", "width must be an integer, got 'wide'"),
        ("resnet18,width=0", r"width must be .*got 0"),
        ("lenet300,width=2", "none: the model has no options"),
        ("fedlean.models.resnet:resnet8,blocks=unit", "no option 'blocks=unit'; .* one of norm"),
        ("resnet19,blocks=unit", "unknown model 'resnet19'"),
    ],
)
def test_options_that_are_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        catalog.build(name, (3, 32, 32), 10)


def test_a_function_of_your_own():
    spec = catalog.build("fedlean.models.resnet:resnet8", (3, 32, 32), 10)
    assert spec == build("resnet8")


@pytest.mark.parametrize(
    "name", ["no.such.module:f", "fedlean.models.conv2:nothing", ":f", "fedlean:", "..x:f"]
)
def test_a_function_that_is_not_there(name: str):
    with pytest.raises(ValueError, match="expected package"):
        catalog.build(name, (1, 8, 8), 10)


def test_a_function_that_is_no_model():
    with pytest.raises(ValueError, match=r"returns must be a ModelSpec, .* got bool"):
        catalog.build("operator:contains", (1,), 10)
    with pytest.raises(ValueError, match="must be a function, got int"):
        catalog.build("sys:maxsize", (1,), 10)


def test_listing_and_building_models_does_not_import_torch():
    code = (
        "import sys; from fedlean.models import catalog, initialise; catalog.available(); "
        "initialise.init_params(catalog.build('resnet8', (3, 8, 8), 10), 0); "
        "print('torch' in sys.modules)"
    )
    assert _python(code) == "False"


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()
