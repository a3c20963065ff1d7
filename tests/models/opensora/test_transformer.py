"""STDiT3 against activations of the original implementation, its file layouts and its errors."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from xfuser_adacorr.models import STDiT3Transformer3DModel, load_open_sora_checkpoint

DATA = Path(__file__).parent / "data"
REFERENCES = ("plain", "masked")
BLOCK_LISTS = ("spatial_blocks", "temporal_blocks")
ORIGINAL_OPTIONS = {
    "_name_or_path": "somewhere",
    "architectures": ["STDiT3"],
    "class_dropout_prob": 0.1,
    "drop_path": 0.0,
    "enable_flash_attn": True,
    "enable_layernorm_kernel": True,
    "enable_sequence_parallelism": False,
    "freeze_y_embedder": True,
    "input_size": [None, None, None],
    "in_channels": 4,
    "input_sq_size": 512,
    "mlp_ratio": 4.0,
    "model_type": "STDiT3",
    "only_train_temporal": False,
    "patch_size": [1, 2, 2],
    "pred_sigma": True,
    "qk_norm": True,
    "skip_y_embedder": False,
    "torch_dtype": "float32",
    "transformers_version": "4.38.2",
}


def read_reference(name):
    """Config, weights, inputs by our argument names, activations and output of a reference."""
    with safe_open(DATA / f"stdit3_reference_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    inputs = part("input.")
    names = {"x": "hidden_states", "y": "encoder_hidden_states", "mask": "encoder_attention_mask"}
    return SimpleNamespace(
        config=config,
        weights=part("weights."),
        inputs={names.get(key, key): value for key, value in inputs.items()},
        activations=part("activation."),
        output=tensors["output"],
    )


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


def capture_blocks(model):
    """Calls of the blocks by name: (keyword arguments, output)."""
    calls = {}

    def hook(name):
        def record(module, args, kwargs, output):
            assert not args
            calls[name] = (kwargs, output)

        return record

    for attribute in BLOCK_LISTS:
        for index, block in enumerate(getattr(model, attribute)):
            name = f"{attribute}.{index}"
            block.register_forward_hook(hook(name), with_kwargs=True)
    return calls


def make_model(reference):
    model = STDiT3Transformer3DModel(**reference.config).eval()
    model.load_state_dict(reference.weights)
    return model


@pytest.fixture(params=REFERENCES)
def reference(request):
    return read_reference(request.param)


@pytest.fixture
def plain():
    return read_reference("plain")


@pytest.fixture
def model(reference):
    return make_model(reference)


@pytest.fixture
def plain_model(plain):
    return make_model(plain)


def write_original(folder, reference, *, shards=1, options=None, weights=None):
    """Write the layout of the published checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = ORIGINAL_OPTIONS | reference.config | (options or {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = reference.weights if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(sorted(weights))}
    for name in names:
        save_file({k: weights[k] for k, v in weight_map.items() if v == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


# -- the computation -----------------------------------------------------------------------------


def test_parameters_are_named_as_in_the_original(reference, model):
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in reference.weights.items()}


def test_activations_and_output_match_the_original(reference, model):
    calls = capture_blocks(model)
    output = model(**reference.inputs).sample
    assert calls.keys() == reference.activations.keys()
    for name, expected in reference.activations.items():
        assert relative_error(calls[name][1], expected) < 1e-4, name
    assert output.shape == reference.output.shape
    assert relative_error(output, reference.output) < 1e-4


def test_bfloat16_stays_close_and_returns_float32(reference, model):
    output = model.to(torch.bfloat16)(**reference.inputs).sample
    assert output.dtype == torch.float32
    assert relative_error(output, reference.output) < 0.05


def test_block_equals_its_branches(reference, model):
    calls = capture_blocks(model)
    model(**reference.inputs)
    for attribute in BLOCK_LISTS:
        for index, block in enumerate(getattr(model, attribute)):
            kwargs, output = calls[f"{attribute}.{index}"]
            x, temb, rotary = kwargs["hidden_states"], kwargs["temb"], kwargs.get("rotary_emb")
            x = x + block.attention_branch(x, temb, kwargs["num_frames"], rotary)
            text, mask = kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"]
            x = x + block.cross_attention_branch(x, text, mask)
            x = x + block.feed_forward_branch(x, temb)
            assert torch.equal(x, output)


def test_modulated_input_feeds_the_attention(reference, model):
    calls, seen = capture_blocks(model), []
    block = model.spatial_blocks[0]
    block.attn.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**reference.inputs)
    kwargs = calls["spatial_blocks.0"][0]
    signal = block.modulated_input(kwargs["hidden_states"], kwargs["temb"])
    assert torch.equal(signal.reshape(seen[0].shape), seen[0])


def test_temporal_block_runs_on_a_share_of_every_frame(reference, model):
    calls = capture_blocks(model)
    model(**reference.inputs)
    kwargs, output = calls["temporal_blocks.0"]

    def share(tokens):
        frames = tokens.unflatten(1, (kwargs["num_frames"], -1))
        return frames[:, :, : frames.shape[2] // 2].flatten(1, 2)

    local = kwargs | {"hidden_states": share(kwargs["hidden_states"])}
    assert relative_error(model.temporal_blocks[0](**local), share(output)) < 1e-5


def test_masked_text_equals_text_without_those_tokens(reference, model):
    mask = reference.inputs["encoder_attention_mask"]
    mask = mask.repeat(len(reference.output) // len(mask), 1).bool()
    output = model(**reference.inputs).sample
    batched = ("hidden_states", "timestep", "x_mask")
    for i, keep in enumerate(mask):
        inputs = {k: v[i : i + 1] if k in batched else v for k, v in reference.inputs.items()}
        text = inputs["encoder_hidden_states"][i : i + 1, :, keep]
        inputs |= {"encoder_hidden_states": text, "encoder_attention_mask": None}
        assert relative_error(model(**inputs).sample, output[i : i + 1]) < 1e-5


def test_text_behind_the_mask_does_not_change_the_output(reference, model):
    output = model(**reference.inputs).sample
    mask = reference.inputs["encoder_attention_mask"]
    mask = mask.repeat(len(output) // len(mask), 1).bool()
    text = reference.inputs["encoder_hidden_states"]
    changed = torch.where(mask[:, None, :, None], text, 100.0)
    inputs = reference.inputs | {"encoder_hidden_states": changed}
    assert torch.equal(model(**inputs).sample, output)


def test_text_without_single_axis_is_the_same(plain, plain_model):
    text = plain.inputs["encoder_hidden_states"]
    inputs = plain.inputs | {"encoder_hidden_states": text[:, 0]}
    expected = plain_model(**plain.inputs).sample
    assert torch.equal(plain_model(**inputs).sample, expected)


def test_sizes_are_padded_with_zeros_and_cropped(plain, plain_model):
    latents = plain.inputs["hidden_states"][..., :5, :7]
    padded = torch.nn.functional.pad(latents, (0, 1, 0, 1))
    output = plain_model(**plain.inputs | {"hidden_states": latents}).sample
    expected = plain_model(**plain.inputs | {"hidden_states": padded}).sample
    assert torch.equal(output, expected[..., :5, :7])


def test_mask_of_noisy_frames_alone_changes_nothing(plain, plain_model):
    all_noisy = torch.ones(2, 3, dtype=torch.bool)
    output = plain_model(**plain.inputs, x_mask=all_noisy).sample
    assert relative_error(output, plain_model(**plain.inputs).sample) < 1e-6


def test_default_size_is_eight_pixels_a_latent(plain, plain_model):
    inputs = {k: v for k, v in plain.inputs.items() if k not in ("height", "width", "fps")}
    explicit = plain_model(**inputs, height=48, width=64, fps=24).sample
    assert torch.equal(plain_model(**inputs).sample, explicit)


def test_tuple_is_returned_on_request(plain, plain_model):
    (sample,) = plain_model(**plain.inputs, return_dict=False)
    assert torch.equal(sample, plain_model(**plain.inputs).sample)


def test_blocks_compile_without_graph_breaks(plain, plain_model):
    expected = plain_model(**plain.inputs).sample
    plain_model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative_error(plain_model(**plain.inputs).sample, expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_states", torch.zeros(2, 5, 3, 6, 8)),
        ("hidden_states", torch.zeros(2, 4, 6, 8)),
        ("encoder_hidden_states", torch.zeros(2, 1, 8, 15)),
        ("encoder_hidden_states", torch.zeros(3, 1, 8, 16)),
        ("encoder_attention_mask", torch.ones(2, 7)),
        ("encoder_attention_mask", torch.ones(3, 8)),
        ("encoder_attention_mask", torch.ones(8)),
        ("x_mask", torch.ones(2, 4, dtype=torch.bool)),
        ("timestep", torch.ones(3)),
        ("fps", torch.ones(3)),
    ],
)
def test_bad_input_is_named(plain, plain_model, name, value):
    with pytest.raises(ValueError, match=name):
        plain_model(**plain.inputs | {name: value})


@pytest.mark.parametrize(
    ("option", "value"), [("hidden_size", 50), ("num_heads", 5), ("patch_size", (2, 2))]
)
def test_bad_option_is_named(plain, option, value):
    with pytest.raises(ValueError, match=option):
        STDiT3Transformer3DModel(**plain.config | {option: value})


# -- files ---------------------------------------------------------------------------------------


def test_saved_model_loads_the_same(tmp_path, plain, plain_model):
    plain_model.save_pretrained(tmp_path)
    loaded = STDiT3Transformer3DModel.from_pretrained(tmp_path)
    assert dict(loaded.config)["hidden_size"] == plain.config["hidden_size"]
    weights = plain_model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    # Mapped files are aligned otherwise than allocated memory, which can change the order of sums.
    torch.testing.assert_close(loaded(**plain.inputs).sample, plain_model(**plain.inputs).sample)


@pytest.mark.parametrize("shards", [1, 3])
def test_original_layout_loads(tmp_path, plain, plain_model, shards):
    loaded = load_open_sora_checkpoint(write_original(tmp_path, plain, shards=shards))
    assert not loaded.training
    weights = plain_model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    # Mapped files are aligned otherwise than allocated memory, which can change the order of sums.
    torch.testing.assert_close(loaded(**plain.inputs).sample, plain_model(**plain.inputs).sample)


@pytest.mark.parametrize("has_ref", [True, False])
def test_hub_cache_folder_loads(tmp_path, plain, has_ref):
    write_original(tmp_path / "snapshots" / "abc", plain)
    if has_ref:
        (tmp_path / "snapshots" / "older").mkdir()
        (tmp_path / "refs").mkdir()
        (tmp_path / "refs" / "main").write_text("abc", encoding="utf-8")
    loaded = load_open_sora_checkpoint(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_overrides_replace_options_of_the_file(tmp_path, plain):
    write_original(tmp_path, plain)
    assert load_open_sora_checkpoint(tmp_path, input_sq_size=256).config.input_sq_size == 256
    with pytest.raises(ValueError, match="overrides: depht"):
        load_open_sora_checkpoint(tmp_path, depht=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kernel_size": [8, 8]}, "kernel_size"),
        ({"model_type": "STDiT2"}, "model_type"),
        ({"skip_y_embedder": True}, "skip_y_embedder"),
    ],
)
def test_unsupported_options_are_named(tmp_path, plain, options, named):
    with pytest.raises(ValueError, match=named):
        load_open_sora_checkpoint(write_original(tmp_path, plain, options=options))


def test_weights_that_do_not_fit_are_named(tmp_path, plain):
    weights = dict(plain.weights)
    weights["extra.weight"] = torch.zeros(1)
    weights["t_block.1.bias"] = torch.zeros(1)
    del weights["x_embedder.proj.bias"]
    message = (
        "unknown: extra.weight; missing: x_embedder.proj.bias; of another shape: t_block.1.bias"
    )
    with pytest.raises(ValueError, match=message):
        load_open_sora_checkpoint(write_original(tmp_path, plain, weights=weights))


def test_other_rotary_frequencies_are_rejected(tmp_path, plain):
    weights = plain.weights | {"rope.freqs": 2 * plain.weights["rope.freqs"]}
    with pytest.raises(ValueError, match="rope.freqs"):
        load_open_sora_checkpoint(write_original(tmp_path, plain, weights=weights))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(tmp_path, plain, name):
    (write_original(tmp_path, plain) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_open_sora_checkpoint(tmp_path)


def test_missing_shard_and_directory_are_named(tmp_path, plain):
    shard = write_original(tmp_path, plain, shards=2) / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_open_sora_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_open_sora_checkpoint(tmp_path / "nowhere")
