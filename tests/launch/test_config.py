"""Messages of the schema, reading from file and command line, dumping, and the shipped configurations."""

import re
from pathlib import Path

import pytest
import yaml

from launch.config import RENAMED_KEYS, Config, dump_config, load_config, parse_config
from launch.typed_yaml import field_type

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
SMALLEST = {"output": "runs/x", "data": {"train": "shards/train", "val": "shards/val"}}

# Model: global batch, then the optimizer's lr, warmup_epochs, warmup_lr, min_lr, weight_decay and max_grad_norm. All
# for 300 epochs at 224 × 224 pixels on 8 GPUs; b5 from scratch has b4's row.
RECIPE = {
    "polaformerpp_b0": (8 * 256, 5e-4, 20, 5e-7, 1e-7, 0.05, 5.0),
    "polaformerpp_b1": (8 * 256, 5e-4, 20, 5e-7, 1e-7, 0.05, 5.0),
    "polaformerpp_b2": (8 * 256, 5e-4, 20, 5e-7, 1e-7, 0.05, 5.0),
    "polaformerpp_b3": (8 * 128, 5e-4, 20, 5e-7, 1e-7, 0.05, 5.0),
    "polaformerpp_b4": (8 * 128, 5e-4, 5, 1e-7, 1e-5, 0.05, 1.0),
    "polaformerpp_b5": (8 * 128, 5e-4, 5, 1e-7, 1e-5, 0.05, 1.0),
    "polaformerpp_b5_finetune": (8 * 64, 2e-5, 1, 5e-7, 5e-6, 1e-8, None),
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "smallest.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def is_model(schema: object) -> bool:
    return hasattr(schema, "model_fields")


def explanation(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as fault:  # noqa: PT011  (every caller checks the whole message)
        load_config(path, list(overrides))
    return str(fault.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "unknown key optimiser; did you mean optimizer?"),
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate; known are epochs, global_batch_size, "),
        ("optimizer.warmup_epoch=1", "unknown key optimizer.warmup_epoch; did you mean warmup_epochs?"),
        ("data.imagesize=64", "unknown key data.imagesize; did you mean image_size?"),
        ("optimizer.epochs=many", "optimizer.epochs is 'many': input should be a valid number, unable to parse"),
        ("optimizer.global_batch_size=1.5", "optimizer.global_batch_size is 1.5: input should be a valid integer"),
        (
            "optimizer.global_batch_size=0",
            "optimizer.global_batch_size is 0: input should be greater than or equal to 1",
        ),
        ("optimizer.lr=0", "optimizer.lr is 0: input should be greater than 0"),
        ("optimizer.lr=.inf", "optimizer.lr is inf: input should be a finite number"),
        ("optimizer.lr=", "optimizer.lr is None: input should be a valid number"),
        ("optimizer.ema_decay=1", "optimizer.ema_decay is 1: input should be less than 1"),
        ("data.mean=0.5", "data.mean is 0.5: input should be a valid tuple"),
        ("data.mean=[0.5, 0.5, .nan]", "data.mean.2 is nan: input should be a finite number"),
        ("data.std=[0.2, 0.2, 0]", "data.std.2 is 0: input should be greater than 0"),
        ("data.std=[0.2, 0.2]", "data.std.2 is [0.2, 0.2]: field required"),
        ("data.image_size=100", "data.image_size is 100: input should be a multiple of 32"),
        ("data.image_size=0", "data.image_size is 0: input should be greater than or equal to 32"),
        ("data.hflip=2", "data.hflip is 2: input should be less than or equal to 1"),
        ("data.crop_pct=0", "data.crop_pct is 0: input should be greater than 0"),
        (
            "data.augmentation=full",
            "data.augmentation is 'full': input should be 'rand-augment', 'three-augment' or 'simple'",
        ),
        ("data.rand_augment.magnitude=11", "data.rand_augment.magnitude is 11: input should be less than or equal to"),
        (
            "data.rand_augment.num_layers=0",
            "data.rand_augment.num_layers is 0: input should be greater than or equal to 1",
        ),
        (
            "data.rand_augment.std=1",
            "unknown key data.rand_augment.std; known are magnitude, magnitude_std, num_layers, prob",
        ),
        ("data.rand_augment=9", "data.rand_augment is 9: input should be a valid dictionary or instance of"),
        ("data.color_jitter=-1", "data.color_jitter is -1: input should be greater than or equal to 0"),
        ("data.interpolation=nearest", "data.interpolation is 'nearest': input should be 'bicubic' or 'bilinear'"),
        ("data.train=", "data.train is not set; set it in the file or on the command line as data.train=…"),
        ("data.shuffle=random", "data.shuffle is 'random': input should be 'auto', 'full' or 'windowed'"),
        ("data.shuffle_window_shards=0", "data.shuffle_window_shards is 0: input should be greater than or equal to 1"),
        ("data.cache_gib=0", "data.cache_gib is 0: input should be greater than 0"),
        ("data.max_bad_samples=-1", "data.max_bad_samples is -1: input should be greater than or equal to 0"),
        ("engine.precision=fp16", "engine.precision is 'fp16': input should be 'bf16' or 'fp32'"),
        ("engine.zero_stage=4", "engine.zero_stage is 4: input should be 0, 1, 2 or 3"),
        ("engine.compile=maybe", "engine.compile is 'maybe': input should be a valid boolean"),
        ("engine=fast", "engine is 'fast': input should be a valid dictionary or instance of EngineSection"),
        ("checkpoint.keep=0", "checkpoint.keep is 0: input should be greater than or equal to 1"),
        ("log.every_steps=0", "log.every_steps is 0: input should be greater than or equal to 1"),
        ("seed=-1", "seed is -1: input should be greater than or equal to 0"),
        ("output=", "output is not set; set it in the file or on the command line as output=…"),
        ("output=null", "output is not set; set it in the file or on the command line as output=…"),
        ("output==runs/x", "override 'output==runs/x' has two =; write output=runs/x"),
        ("output=runs/\udcff", "output is 'runs/\\udcff': not UTF-8; rename the folder"),
        ("data.shuffle=no", "data.shuffle is 'no': input should be 'auto', 'full' or 'windowed'"),
        ("optimizer.epochs=1:30", "optimizer.epochs is '1:30': input should be a valid number"),
        (
            "model.name=resnet50",
            "model.name resnet50 is unknown; use one of polaformerpp_b0, polaformerpp_b1, polaformerpp_b2,"
            " polaformerpp_b3, polaformerpp_b4, polaformerpp_b5",
        ),
        (
            "model.new_head=true",
            "model.new_head is for starting from weights; set model.weights or leave it out",
        ),
        (
            "optimizer.epochs=4",
            "optimizer.warmup_epochs 5 leaves nothing of 4 epochs; use fewer, for example 0.2",
        ),
        (
            "guard.hang_seconds=560",
            "guard.hang_seconds 560 is too near to the 600 s of engine.timeout_minutes, which would end the run before"
            " the hang is explained; use at most 450, or raise the timeout",
        ),
        ("optimizer.min_lr=0.1", "optimizer.min_lr 0.1 is above optimizer.lr 0.0005; lower it"),
        (
            "deepspeed.train_batch_size=8",
            "deepspeed.train_batch_size is derived; set optimizer.global_batch_size instead",
        ),
        (
            "deepspeed.optimizer.type=Lion",
            "deepspeed.optimizer is derived; set the optimizer section instead",
        ),
        (
            "deepspeed.gradient_clipping=3",
            "deepspeed.gradient_clipping is derived; set optimizer.max_grad_norm instead",
        ),
        (
            "deepspeed.zero_optimization.compute_grad_norm=false",
            "deepspeed.zero_optimization.compute_grad_norm cannot be used: steps are skipped by the gradient norm",
        ),
        (
            "deepspeed.zero_optimization.stage=3",
            "deepspeed.zero_optimization.stage is derived; set engine.zero_stage instead",
        ),
        ("deepspeed.bf16.enabled=true", "deepspeed.bf16 is derived; set engine.precision instead"),
        ("deepspeed.fp16=true", "deepspeed.fp16 is derived; set engine.precision instead"),
        ("deepspeed.amp.enabled=true", "deepspeed.amp is derived; set engine.precision instead"),
        (
            "deepspeed.torch_autocast.dtype=float16",
            "deepspeed.torch_autocast.dtype is derived; set engine.precision instead",
        ),
        (
            "deepspeed.zero_optimization.offload_optimizer.device=cpu",
            "deepspeed.zero_optimization.offload_optimizer is for DeepSpeed's own optimizer, and this is PyTorch's"
            " AdamW; leave it out, or set deepspeed.zero_force_ds_cpu_optimizer=false as well, which is slow",
        ),
        (
            "deepspeed.zero_optimization.elastic_checkpoint=true",
            "deepspeed.zero_optimization.elastic_checkpoint cannot be used: checkpoints fit any number of ranks as",
        ),
        ("deepspeed.checkpoint.load_universal=true", "deepspeed.checkpoint.load_universal cannot be used: checkpoints"),
        (
            "deepspeed.zero_optimisation.overlap_comm=true",
            "deepspeed.zero_optimisation is nothing that a run here can use; did you mean zero_optimization?",
        ),
        ("deepspeed.zero_optimization=1", "deepspeed.zero_optimization is 1; it is a section, set keys in it"),
        ("deepspeed=1", "deepspeed is 1: input should be a valid dictionary"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1 is 1: input should be less than 1"),
        ("optimizer.lr", "override 'optimizer.lr' is not key=value; write for example optimizer.lr=1e-3"),
        ("=3", "override '=3' is not key=value; write for example optimizer.lr=1e-3"),
        ("output.folder=x", "override 'output.folder=x': output is a value, not a section"),
        ("data.train.0=x", "override 'data.train.0=x': train is a value, not a section"),
        ("data.mean=[1, 2", "override 'data.mean=[1, 2' is not YAML: while parsing a flow sequence"),
    ],
)
def test_invalid_overrides(file, override, message):
    explained = explanation(file, override)
    assert explained.startswith(message)
    assert "\n" not in explained


RENAMED = [
    ("data.order", "data.shuffle"),
    ("data.window_shards", "data.shuffle_window_shards"),
    ("data.max_broken", "data.max_bad_samples"),
    ("data.flip_probability", "data.hflip"),
    ("data.recipe", "data.augmentation"),
    ("data.rand_augment.spread", "data.rand_augment.magnitude_std"),
    ("data.rand_augment.layers", "data.rand_augment.num_layers"),
    ("data.rand_augment.probability", "data.rand_augment.prob"),
    ("data.eval_resize", "data.crop_mode (value short → center)"),
    ("data.eval_crop_fraction", "data.crop_pct"),
    ("data.mix_group", "data.mixup_group_size"),
    ("data.mix_probability", "data.mixup_prob"),
    ("data.switch_probability", "data.mixup_switch_prob"),
    ("data.erase_probability", "data.reprob"),
    ("optimizer.global_batch", "optimizer.global_batch_size"),
    ("optimizer.accumulation", "optimizer.gradient_accumulation_steps"),
    ("optimizer.clip", "optimizer.max_grad_norm"),
    ("engine.bucket_elements", "engine.bucket_numel"),
]


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_an_old_key_names_the_new_one(file, old, new):
    """In an override, and in a file beside other faults."""
    assert explanation(file, f"{old}=1") == f"{old} is now {new}"
    tree = yaml.safe_load(file.read_text())
    section, names = tree, old.split(".")
    for name in names[:-1]:
        section = section.setdefault(name, {})
    section[names[-1]] = 1
    file.write_text(yaml.safe_dump(tree))
    lines = explanation(file, "seed=-1").splitlines()
    assert sorted(lines) == sorted([f"{old} is now {new}", "seed is -1: input should be greater than or equal to 0"])


def test_every_renamed_key_is_tested_and_names_a_key_of_the_schema():
    assert {old: new.partition(" ")[0] for old, new in RENAMED} == RENAMED_KEYS
    for new in RENAMED_KEYS.values():
        schema = Config
        for name in new.split("."):
            schema = field_type(schema, name)
        assert schema is not None, new


def test_a_value_of_the_old_version(file):
    assert (
        explanation(file, "data.crop_mode=short") == "data.crop_mode is 'short': input should be 'squash' or 'center'"
    )


def test_missing_required_keys(tmp_path):
    (tmp_path / "empty.yaml").touch()
    assert explanation(tmp_path / "empty.yaml", "data.val=x") == (
        "output is not set; set it in the file or on the command line as output=…\n"
        "data.train is not set; set it in the file or on the command line as data.train=…"
    )


def test_each_fault_has_a_line(file):
    lines = explanation(file, "optimizer.lr=-1", "modle.name=x", "data.hflip=no way", "seed=0.5").splitlines()
    assert [line.split(" is ")[0].split(";")[0] for line in lines] == [
        "seed",
        "data.hflip",
        "optimizer.lr",
        "unknown key modle",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"output: [1", "bad.yaml is not YAML: while parsing a flow sequence .* line 1, column 11"),
        (b"output: a\n\tseed: 1", "bad.yaml is not YAML: .* line 2, column 1"),
        (b"output: \xff", "bad.yaml is not YAML: .*position 8"),
        (b"1: 2", "1 is 1: keys should be strings"),
        (b"seed: 1\noptimizer: {lr: 1}\nseed: 2", "bad.yaml: seed is set twice, on lines 1 and 3; keep one$"),
        (b"data:\n  train: a\n  val: b\n  train: c", "bad.yaml: train is set twice, on lines 2 and 4; keep one$"),
        (b"data: &data\n  train: *data", "bad.yaml has an alias within the value that it stands for; write that out$"),
        (b"output: runs/x: y", "bad.yaml is not YAML: .*; put quotes around text that holds ': '$"),
        (b"output: [runs]", r"output is \['runs'\]: input is not a valid path"),
        (b"- output", r"bad.yaml holds no sections but \['output'\]; write for example output: runs/b4"),
        (b"output", "bad.yaml holds no sections but 'output'"),
    ],
)
def test_invalid_files(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content)
    explained = explanation(tmp_path / "bad.yaml", "data.train=a", "data.val=b")
    assert re.search(message, explained)


def test_a_missing_file_lists_the_others(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration at .*/b4.yaml; there are: none in that folder$"):
        load_config(tmp_path / "b4.yaml", [])
    for name in ("two.yaml", "one.yaml", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=f"there are: {tmp_path}/one.yaml, {tmp_path}/two.yaml$"):
        load_config(tmp_path / "b4.yaml", [])


def test_overrides_precede_the_file_and_the_file_precedes_defaults(file):
    file.write_text(yaml.safe_dump(SMALLEST | {"optimizer": {"lr": 0.25, "max_grad_norm": 2.0}, "seed": 3}))
    config = load_config(file, ["optimizer.max_grad_norm=", "seed=4", "seed=5", "engine.compile=true", "data.hflip=0"])
    assert (config.optimizer.lr, config.optimizer.max_grad_norm, config.optimizer.epochs) == (0.25, None, 300)
    assert (config.seed, config.engine.compile, config.data.hflip) == (5, True, 0.0)


TYPED = [
    "runs/hash #1",
    "2024",
    "on",
    "2024-05-01",
    "/data/x: y",
    "[a, b]",
    "{a}",
    "'quoted'",
    "0100",
    "1e3",
    "größe &*!",
]


def test_merged_values_are_taken_as_written(tmp_path):
    (tmp_path / "x.yaml").write_text("output: 2024\ndata: {<<: [{train: 0100}, {val: on, train: no}], cache: 1e3}\n")
    config = load_config(tmp_path / "x.yaml", [])
    assert (config.data.train, config.data.val, str(config.data.cache)) == ("0100", "on", "1e3")


def test_a_lone_tilde(file):
    """It is null, as in YAML, if the key may be null, else the home folder."""
    config = load_config(file, ["output=~", "data.train=~", "data.cache=~"])
    assert (config.output, config.data.train, config.data.cache) == (Path.home(), str(Path.home()), None)


@pytest.mark.parametrize("text", TYPED)
def test_names_and_paths_are_taken_as_typed(file, text):
    keys = "output", "data.train", "data.val", "data.cache", "model.weights"
    config = load_config(file, [f"{key}={text}" for key in keys])
    assert (config.output, config.data.train, config.data.val) == (Path(text), text, text)
    assert config.data.cache == config.model.weights == Path(text)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert "model.name 2024 is unknown" in explanation(file, "model.name=2024")


@pytest.mark.parametrize("text", ["2024", "on", "2024-05-01", "0100", "1e3", "1:30", "runs/#1", "'runs/hash #1'"])
def test_names_and_paths_in_a_file_are_taken_as_written(tmp_path, text):
    (tmp_path / "x.yaml").write_text(f"output: {text}\ndata: {{train: {text}, val: {text}, cache: {text}}}\n")
    config, written = load_config(tmp_path / "x.yaml", []), text.strip("'")
    assert (config.output, config.data.cache) == (Path(written), Path(written))
    assert config.data.train == config.data.val == written
    assert load_config(tmp_path / "x.yaml", [f"data={{train: {text}, val: y}}"]).data.train == written


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """In overrides and files, at the beginning of paths; not within URLs, nor where YAML means null."""
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "x.yaml"
    file.write_text("output: ~/runs/x\ndata: {train: ~/data, val: https://host/~me/val, cache: ~}\n")
    config = load_config(file, ["model.weights=~/b4.pth"])
    assert (config.output, config.model.weights) == (Path("/home/me/runs/x"), Path("/home/me/b4.pth"))
    assert (config.data.train, config.data.val, config.data.cache) == ("/home/me/data", "https://host/~me/val", None)


def test_a_file_of_another_editor(tmp_path):
    """A byte-order mark, Windows line ends, and a section whose lines are all commented out."""
    text = "output: runs/x\ndata:\n  train: a\n  val: b\noptimizer:\n#  lr: 1\ndeepspeed:\n".replace("\n", "\r\n")
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    config = load_config(tmp_path / "x.yaml", ["optimizer.max_grad_norm=2"])
    assert (config.output, config.data.val, config.optimizer.max_grad_norm) == (Path("runs/x"), "b", 2)


def test_numbers_are_those_of_yaml_1_2(file):
    config = load_config(
        file, ["seed=010", "optimizer.global_batch_size=1e3", "deepspeed={communication_data_type: 1e3}"]
    )
    assert (config.seed, config.optimizer.global_batch_size) == (10, 1000)
    assert config.deepspeed == {"communication_data_type": 1000.0}


def test_offloading_with_pytorchs_optimizer(file):
    override = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
    load_config(file, [override, "deepspeed.zero_force_ds_cpu_optimizer=false"])


def test_values_of_overrides_are_yaml(file):
    config = load_config(
        file,
        [
            "output=runs/a=b",
            "optimizer.lr=1e-3",  # a string to YAML 1.1, which asks for a dot
            "optimizer.betas=[0.9, 0.95]",
            "optimizer.global_batch_size=1_024",
            "model.weights=null",
            "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0}",
            "deepspeed.zero_optimization.ignore_unused_parameters=true",
        ],
    )
    assert config.output == Path("runs/a=b")
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.global_batch_size == 1024
    assert config.model.weights is None
    section = {"stage3_param_persistence_threshold": 0, "ignore_unused_parameters": True}
    assert config.deepspeed == {"zero_optimization": section}


def test_a_number_without_a_dot_in_the_file(file):
    file.write_text(f"{file.read_text()}\noptimizer:\n  lr: 1e-3\n  eps: 1E-7\n")
    config = load_config(file, [])
    assert (config.optimizer.lr, config.optimizer.eps) == (1e-3, 1e-7)


def test_a_dumped_configuration_is_read_back(file):
    config = load_config(
        file,
        [
            "output=runs/größer",
            "model.weights=weights/b4.pth",
            "model.new_head=true",
            "optimizer.max_grad_norm=null",
            "optimizer.warmup_lr=1e-7",
            "data.crop_ratio=[0.3333333333333333, 3]",
            "data.train=s3://bucket/größe/train",
            "data.cache=/scratch/shards",
            "seed=9223372036854775807",
            "deepspeed.zero_optimization={ignore_unused_parameters: true, nested: [1, x, null]}",
        ],
    )
    text = dump_config(config)
    assert parse_config(yaml.safe_load(text)) == config
    assert {"größer", "warmup_lr: 1.0e-07"} <= set(re.findall(r"größer|warmup_lr.*", text))
    assert set(yaml.safe_load(text)) == set(type(config).model_fields)


def test_configurations_are_immutable(file):
    config = load_config(file, [])
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_and_is_read_back(path):
    config = load_config(path, [])
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_the_readme_names_every_key_and_override():
    text = (CONFIGS / "README.md").read_text()
    sections = [section for section in (field_type(Config, name) for name in Config.model_fields) if is_model(section)]
    keys = {*Config.model_fields, *(key for section in sections for key in section.model_fields)}
    assert {key for key in keys if f"`{key}`" not in text} == set()
    overrides = re.findall(r"(?<=[` ])(?:data|optimizer|model|engine)\.[\w.]+=(?:\[[^]]*\]|\{[^}]*\}|[\w.-]+)", text)
    assert len(overrides) > 5
    load_config(CONFIGS / "polaformerpp_b4.yaml", overrides)


def test_every_recipe_is_shipped():
    assert {path.stem for path in SHIPPED} == {*RECIPE, "quickstart"}


@pytest.mark.parametrize("name", RECIPE)
def test_the_official_recipe(name):
    config = load_config(CONFIGS / f"{name}.yaml", [])
    optimizer, data = config.optimizer, config.data
    assert config.model.name == name.removesuffix("_finetune")
    assert (
        optimizer.global_batch_size,
        optimizer.lr,
        optimizer.warmup_epochs,
        optimizer.warmup_lr,
        optimizer.min_lr,
        optimizer.weight_decay,
        optimizer.max_grad_norm,
    ) == RECIPE[name]
    assert (optimizer.epochs, optimizer.betas, optimizer.eps, optimizer.ema_decay) == (300, (0.9, 0.999), 1e-8, 0.99982)
    assert (data.image_size, data.crop_scale, data.crop_ratio, data.hflip) == (
        224,
        (0.08, 1.0),
        (3 / 4, 4 / 3),
        0.5,
    )
    assert (data.crop_mode, data.crop_pct, data.interpolation) == ("squash", 224 / 256, "bicubic")
    assert (data.augmentation, data.color_jitter) == ("rand-augment", None)
    assert data.rand_augment.model_dump() == {"magnitude": 9, "magnitude_std": 0.5, "num_layers": 2, "prob": 0.5}
    assert (data.mixup, data.cutmix, data.label_smoothing) == (0.8, 1.0, 0.1)
    assert (data.mixup_prob, data.mixup_switch_prob) == (1.0, 0.5)
    assert data.mixup_group_size == optimizer.global_batch_size / 8, "a GPU's batch"
    assert (data.reprob, data.mean, data.std) == (0.25, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (config.model.drop_path_rate, config.model.num_classes) == (None, None)
