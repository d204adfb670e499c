"""The six models: parameters and FLOPs, vectors of the official implementation, timm's interface."""

import io
import math

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from timm.models import create_feature_extractor, get_model_input_config, group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

import polaformer
from polaformer.weights import load_weights, official_name

PARAMETERS = {"b0": 7548712, "b1": 9227496, "b2": 16450664, "b3": 27145896, "b4": 49798792, "b5": 97773000}
GIGA_MULTIPLY_ADDS = {"b0": 0.668, "b1": 1.003, "b2": 2.731, "b3": 5.070, "b4": 11.05, "b5": 17.74}


def shape_of(value) -> list[int]:
    return value.type().sizes()


def count_softmax_attention(inputs, outputs) -> int:
    batch, heads, tokens, head_dim = shape_of(inputs[0])
    return 2 * batch * heads * tokens**2 * head_dim


def count_polarity_attention(inputs, outputs) -> int:
    """State and both numerators (4·D² per token and head), both denominators (4·D)."""
    batch, heads, tokens, head_dim = shape_of(inputs[0])
    return batch * heads * tokens * (4 * head_dim**2 + 4 * head_dim)


def count_depthwise(inputs, outputs) -> int:
    return math.prod(shape_of(inputs[0])) * math.prod(shape_of(inputs[1])[2:])


@pytest.mark.parametrize(
    "preset", ["b0", "b1", "b2", "b3", *(pytest.param(preset, marks=pytest.mark.slow) for preset in ("b4", "b5"))]
)
def test_parameters_and_flops(preset):
    model = timm.create_model(f"polaformerpp_{preset}").eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[preset]
    counter = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counter.set_op_handle("aten::scaled_dot_product_attention", count_softmax_attention)
    counter.set_op_handle("polaformer::polarity_attention", count_polarity_attention)
    counter.set_op_handle("polaformer::depthwise_conv2d", count_depthwise)
    wanted = GIGA_MULTIPLY_ADDS[preset]
    digits = 3 if wanted < 10 else 2
    assert round(counter.total() / 1e9, digits) == wanted


@pytest.mark.parametrize(("preset", "size"), [("b0", (224, 224)), pytest.param("b4", (64, 96), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_golden(golden, official_state, relative_error, draw, preset, size, dtype, tolerance):
    arrays = golden(f"model_{preset}_{size[0]}x{size[1]}")
    model = timm.create_model(f"polaformerpp_{preset}").to(dtype).eval()
    model.load_state_dict(official_state(preset))
    image = torch.from_numpy(draw("input", (2, 3, *size))).to(dtype).requires_grad_()
    logits = model(image)
    assert relative_error(logits, arrays["logits"]) < tolerance

    (logits * torch.from_numpy(draw("cotangent", (2, 1000))).to(dtype)).sum().backward()
    norms = {official_name(name): parameter.grad.double().norm() for name, parameter in model.named_parameters()}
    assert set(norms) == set(arrays["param_names"])
    for name, norm in zip(arrays["param_names"], arrays["grad_norms"], strict=True):
        assert relative_error(norms[name], norm) < tolerance, name
    assert relative_error(image.grad, arrays["grad_input"]) < max(tolerance, 1e-6)  # stored in float32


@pytest.mark.parametrize("size", [(32, 32), (64, 160), (224, 32)])
def test_any_multiple_of_32(size):
    model = timm.create_model("polaformerpp_b0", num_classes=7).eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 7)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((224, 250), "image width 250 is not a multiple of 32; use 224 or 256"),
        ((33, 32), "image height 33 is not a multiple of 32; use 32 or 64"),
        ((16, 32), "image height 16 is not a multiple of 32; use 32 or 64"),
    ],
)
def test_other_sizes(size, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("polaformerpp_b0")(torch.randn(1, 3, *size))


def test_initialisation():
    model = timm.create_model("polaformerpp_b4")
    assert model.stages[1].blocks[0].gamma_1.unique().tolist() == [1.0]
    assert model.stages[2].blocks[0].gamma_2.unique() == torch.tensor(1e-6)
    assert all(not block.attn.same_logits.any() for stage in model.stages[:2] for block in stage.blocks)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std() < 0.03, name
            assert not module.bias.any(), name
    assert 0.018 < model.head.weight.std() < 0.022
    fan_in = model.stages[3].blocks[0].ffn.fc1.in_features
    assert model.stages[3].blocks[0].ffn.fc1.weight.abs().max() <= fan_in**-0.5  # PyTorch's default


def test_drop_path_rises_over_all_blocks():
    model = timm.create_model("polaformerpp_b5")
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [block.drop_path1.drop_prob for block in blocks]
    assert [block.drop_path2.drop_prob for block in blocks] == rates
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.55, 38))


def test_features_only():
    model = timm.create_model("polaformerpp_b1", features_only=True)
    assert model.feature_info.channels() == [32, 64, 192, 384]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))]
    assert shapes == [(1, 32, 16, 24), (1, 64, 8, 12), (1, 192, 4, 6), (1, 384, 2, 3)]


@pytest.mark.parametrize("feature_cls", ["getter", "fx", "hook"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2), (0,)])
@pytest.mark.parametrize("loaded_by", ["checkpoint_path", "pretrained"])
def test_features_of_official_weights(official_state, tmp_path, out_indices, feature_cls, loaded_by):
    path = tmp_path / "official.pth"
    torch.save({"model": official_state("b0")}, path)
    pretrained = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    weights = {"checkpoint_path": path} if loaded_by == "checkpoint_path" else pretrained
    features = timm.create_model(
        "polaformerpp_b0", features_only=True, feature_cls=feature_cls, out_indices=out_indices, **weights
    ).eval()
    whole = timm.create_model("polaformerpp_b0").eval()
    load_weights(whole, tmp_path / "official.pth")
    image = torch.randn(1, 3, 64, 64)
    _, expected = whole.forward_intermediates(image, indices=list(out_indices))
    for actual, wanted in zip(features(image), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("feature_cls", ["list", "dict"])
def test_feature_classes_that_need_a_sequence_of_stages(feature_cls):
    with pytest.raises(ValueError, match=f"feature_cls {feature_cls} is not offered; use getter .*, fx or hook"):
        timm.create_model("polaformerpp_b0", features_only=True, feature_cls=feature_cls)


def test_timm_classifier_interface():
    model = timm.create_model("polaformerpp_b0", num_classes=0, in_chans=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 2048)
    model.reset_classifier(5)
    assert model.get_classifier().out_features == model.num_classes == 5
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    config = timm.data.resolve_data_config({}, model=model)
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (0.875, "squash", "bicubic")
    assert polaformer.PRESETS.keys() == set(timm.list_models("polaformerpp_*"))


@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax"])
def test_pooling(pooling):
    """Pooling the head's unpooled output equals the output of a head with that pooling."""
    model = timm.create_model("polaformerpp_b0", num_classes=0, global_pool="").eval()
    image = torch.randn(2, 3, 64, 96)
    unpooled = model(image)
    assert unpooled.shape == (2, 2048, 2, 3)
    average, largest = unpooled.mean((2, 3)), unpooled.amax((2, 3))
    expected = {"avg": average, "max": largest, "avgmax": (average + largest) / 2}[pooling]
    model.reset_classifier(0, pooling)
    torch.testing.assert_close(model(image), expected)
    again = timm.create_model("polaformerpp_b0", num_classes=0, global_pool=pooling).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(image), model(image))


def test_unpooled_logits():
    model = timm.create_model("polaformerpp_b0", num_classes=5, global_pool="").eval()
    image = torch.randn(2, 3, 64, 96)
    logits = model(image)
    assert logits.shape == (2, 5, 2, 3)
    classifier = model.get_classifier()
    model.reset_classifier(0)  # the pooling stays as it is
    torch.testing.assert_close(logits[:, :, 1, 2], classifier(model(image)[:, :, 1, 2]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"global_pool": "catavgmax"}, "global_pool 'catavgmax' is not offered; use one of 'avg', 'max', 'avgmax', ''"),
        ({"output_stride": 16}, "output_stride 16 is not offered; leave it out: it is 32"),
        ({"img_size": 100}, "image height 100 is not a multiple of 32; use 96 or 128"),
        ({"img_size": (96, 100)}, "image width 100 is not a multiple of 32; use 96 or 128"),
    ],
)
def test_options_that_are_not_offered(option, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("polaformerpp_b0", **option)


def test_img_size_is_what_timm_records():
    model = timm.create_model("polaformerpp_b0", num_classes=3, img_size=(96, 64), output_stride=32, in_chans=1).eval()
    recorded = get_model_input_config(model)
    assert (recorded["input_size"], recorded["fixed_input_size"]) == ((1, 96, 64), False)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)


def test_device_and_dtype():
    model = timm.create_model("polaformerpp_b0", device="meta", dtype=torch.bfloat16)
    model.reset_classifier(3)
    kinds = {(x.device.type, x.dtype) for x in model.state_dict().values()}
    assert kinds == {("meta", torch.bfloat16), ("meta", torch.long)}  # long: BatchNorm's counters


def test_pruning_leaves_features():
    model = timm.create_model("polaformerpp_b0").eval()
    image = torch.randn(1, 3, 64, 64)
    [expected] = model.forward_intermediates(image, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_head=False) == [1]
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (64, 64, 0)
    assert torch.equal(model(image), expected)


def test_layers_by_depth():
    model = timm.create_model("polaformerpp_b0")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    depths = [groups[name] for name, _ in model.named_parameters()]
    assert depths == sorted(depths)  # parameters are in the order in which an image passes them
    assert max(depths) == 9  # 0 is the stem; each block and the classifier are one deeper
    assert groups["stages.0.downsample.norm.bias"] == groups["stages.0.blocks.1.gamma_1"] == 2
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 6
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.5)
    scale = {id(x): group["lr_scale"] for group in optimizer.param_groups for x in group["params"]}
    assert scale[id(model.stem[0].weight)] == 0.5**9
    assert scale[id(model.proj.weight)] == 0.5
    assert scale[id(model.head.weight)] == 1


def test_symbolic_trace():
    model = timm.create_model("polaformerpp_b0", num_classes=4)
    torch.fx.symbolic_trace(model)(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    image = torch.randn(1, 3, 32, 96)
    assert torch.equal(torch.fx.symbolic_trace(model.eval())(image), model(image))
    extractor = create_feature_extractor(model, ["stages.2.features", "head"])
    assert torch.equal(extractor(image)["head"].flatten(1), model(image))
    with pytest.raises(ValueError, match="image height 33 is not a multiple of 32; use 32 or 64"):
        extractor(torch.randn(1, 3, 33, 32))


def test_vmap():
    model = timm.create_model("polaformerpp_b0", num_classes=4).eval()
    images = torch.randn(3, 1, 3, 64, 32)
    torch.testing.assert_close(torch.func.vmap(model)(images)[:, 0], model(images[:, 0]), rtol=1e-4, atol=1e-5)


def test_per_sample_gradients():
    model = timm.create_model("polaformerpp_b0", num_classes=4).eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    images = torch.randn(2, 3, 32, 64)

    def loss(parameters, image):
        return torch.func.functional_call(model, (parameters, buffers), image[None]).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for number, image in enumerate(images):
        for name, expected in torch.func.grad(loss)(parameters, image).items():
            torch.testing.assert_close(mapped[name][number], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript():
    model = timm.create_model("polaformerpp_b0", num_classes=4, scriptable=True).eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in ((64, 64), (32, 96)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(scripted(image), model(image))
    with pytest.raises(torch.jit.Error, match="image height 33 is not a multiple of 32; use 32 or 64"):
        scripted(torch.randn(1, 3, 33, 32))


def test_pickled_model():
    model = timm.create_model("polaformerpp_b0", num_classes=4).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    again.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image), model(image))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_classes": 7},
        {"num_classes": 0},
        {"in_chans": 1},
        {"features_only": True},
        {"global_pool": ""},
        {"pretrained_cfg_overlay": {"mean": (0.5, 0.5, 0.5)}},
    ],
)
def test_timm_export(change, tmp_path):
    model = timm.create_model("polaformerpp_b0", num_classes=4)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **change)
    again = getattr(again, "model", again)
    assert torch.equal(again.stages[1].blocks[0].ffn.fc1.weight, model.stages[1].blocks[0].ffn.fc1.weight)
    expected = model.stem[0].weight
    expected = expected.sum(1, keepdim=True) if change.get("in_chans") == 1 else expected
    torch.testing.assert_close(again.stem[0].weight, expected)
    if change.get("num_classes", 4) == 4 and "features_only" not in change:
        assert torch.equal(again.head.weight, model.head.weight)


def test_gradient_checkpointing_keeps_gradients():
    model = timm.create_model("polaformerpp_b0", num_classes=4, drop_path_rate=0.3)
    image = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)  # drop path
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph(autocast):
    """Forward and backward, without a graph break at the attention operator."""
    model = timm.create_model("polaformerpp_b0", num_classes=4).eval()
    image = torch.randn(
        1, 3, 64, 64
    )  # at 64×32, oneDNN's AMX convolution from 4×2 to 2×1 pixels reads beyond its input
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = forward(image)
        logits.float().square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    if autocast:  # not one by one: some gradients are 0 but for rounding
        eager, compiled = (torch.cat([x.float().flatten() for x in result]) for result in results)
        assert (compiled - eager).norm() < 0.05 * eager.norm()
    else:
        torch.testing.assert_close(results[1], results[0])
