"""Plans of configurations on real shards, errors of those that do not fit, and the command."""

import os
import shutil
from pathlib import Path

import pytest
import timm
import torch

from dataio.augment.policies import RandAugment
from dataio.pack.packer import PackOptions, pack
from dataio.remote.options import cache_options
from launch.plan import check_output, describe, keep_norm_group, main, make_plan


def test_steps_batches_and_learning_rates(configure):
    config = configure(
        "optimizer.global_batch_size=48", "optimizer.gradient_accumulation_steps=2", "optimizer.epochs=5"
    )
    plan = make_plan(config, rank=2, world_size=3)
    assert (plan.samples_per_epoch, len(plan.val), plan.num_classes) == (len(plan.train), 400 - len(plan.train), 10)
    assert plan.steps == -(-5 * plan.samples_per_epoch // 48)
    assert plan.schedule.warmup_steps == -(-4 * plan.samples_per_epoch // 480)  # 0.4 epochs
    assert plan.schedule.peak_lr == pytest.approx(1.6e-2 * 48 / 512)
    assert (plan.loader_options.rank, plan.loader_options.world_size, plan.loader_options.micro_batch_size) == (2, 3, 8)


def test_more_outputs_than_classes_are_allowed(configure):
    assert make_plan(configure("model.num_classes=12"), 0, 1).num_classes == 12


def test_what_dataio_is_told(configure):
    config = configure(
        *("data.image_size=64", "data.crop_mode=center", "data.crop_pct=0.9", "data.interpolation=bilinear"),
        *("data.crop_scale=[0.2, 0.9]", "data.crop_ratio=[0.5, 2]", "data.hflip=0.25", "data.threads=3"),
        *("data.prefetch_batches=5", "data.mean=[0.1, 0.2, 0.3]", "data.std=[0.4, 0.5, 0.6]"),
        *("data.augmentation=three-augment", "data.color_jitter=0.2", "data.mixup=0.3"),
        *("data.rand_augment={magnitude: 7, magnitude_std: 1, num_layers: 3, prob: 0.4}", "data.mixup_switch_prob=0.9"),
        *("data.cutmix=0.7", "data.mixup_prob=0.6", "data.label_smoothing=0.05", "data.reprob=0.15"),
        "data.mixup_group_size=6",
    )
    images = mixing = config.data
    assert (images.image_size, images.crop_mode, images.crop_pct) == (64, "center", 0.9)
    assert (images.interpolation, images.crop_scale, images.crop_ratio) == ("bilinear", (0.2, 0.9), (0.5, 2))
    assert (images.hflip, images.threads, images.prefetch_batches) == (0.25, 3, 5)
    assert (images.mean, images.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (images.augmentation, images.color_jitter) == ("three-augment", 0.2)
    assert images.rand_augment == RandAugment(magnitude=7, magnitude_std=1, num_layers=3, prob=0.4)
    assert (mixing.mixup_switch_prob, mixing.mixup_group_size) == (0.9, 6)
    assert (mixing.mixup, mixing.cutmix, mixing.mixup_prob) == (0.3, 0.7, 0.6)
    assert (mixing.label_smoothing, mixing.reprob) == (0.05, 0.15)


def test_a_mixup_group_is_at_most_a_step(configure):
    groups = {
        make_plan(
            configure(f"optimizer.global_batch_size={size}", "data.mixup=0.8"), 0, 1
        ).batch_augment.mixup_group_size
        for size in (64, 256)
    }
    assert groups == {64, 128}


def test_fetching_times_out_before_a_hang_is_diagnosed_and_that_before_collectives_time_out(
    configure, fashion_shards, tmp_path
):
    paths = f"data.train={(fashion_shards / 'train').as_uri()}", f"data.cache={tmp_path / 'cache'}"
    config = configure(*paths, "engine.timeout_minutes=30")
    assert config.hang_seconds == 0.75 * 30 * 60
    retry_policy = make_plan(config, 0, 1).train.remote.cache.retry_policy
    assert (retry_policy.file_timeout_seconds, retry_policy.batch_timeout_seconds) == (0.4 * 30 * 60, 0.65 * 30 * 60)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.gradient_accumulation_steps=2",
            "a batch of 15 images per rank cannot be mixed in pairs; use 16, or set mixup",
        ),
        ("data.mixup_group_size=31", "data.mixup_group_size is 31; images are mixed in pairs, use an even number"),
    ],
)
def test_an_odd_batch_cannot_be_mixed(configure, override, message):
    with pytest.raises(ValueError, match=message):
        make_plan(configure("optimizer.global_batch_size=30", "data.mixup=0.8", override), 0, 1)
    make_plan(configure("optimizer.global_batch_size=30", "data.mixup=0", override), 0, 1)


def test_an_odd_batch_or_group_is_fine_where_nothing_is_mixed(configure):
    off = "data.mixup=0", "data.cutmix=0"
    assert make_plan(configure("optimizer.global_batch_size=7", *off), 0, 1).loader_options.micro_batch_size == 7
    make_plan(configure("data.mixup_group_size=3", *off), 0, 1)


@pytest.mark.parametrize(("old", "new"), [("--ranks", "--world-size"), ("--machines", "--nodes")])
def test_options_of_earlier_versions_name_the_new_ones(capsys, old, new):
    with pytest.raises(SystemExit):
        main(["--config", "configs/quickstart.yaml", old, "2"])
    assert capsys.readouterr().err.endswith(f"error: {old} is now {new}\n")


def test_an_indivisible_batch_is_an_error(configure):
    config = configure("optimizer.global_batch_size=1000", "optimizer.gradient_accumulation_steps=2")
    message = "^global batch 1000 is not divisible by 8 ranks × 2 accumulation; use 992 or 1008, or 5 or 10 ranks$"
    with pytest.raises(ValueError, match=message):
        make_plan(config, 0, 8)


def test_validation_with_unknown_classes_is_an_error(configure, shards, fashion_shards):
    message = (
        'class "astronaut" of .*photos is not among the 10 classes of .*train, such as Ankle_boot, Bag, Coat; leave'
    )
    with pytest.raises(ValueError, match=message):
        make_plan(configure(f"data.val={shards}"), 0, 1)


@pytest.fixture(scope="module")
def packed_classes(fashion, tmp_path_factory):
    """Returns a function: names of classes of `fashion` → a folder of their images, packed."""

    def pack_some(*names: str):
        root = tmp_path_factory.mktemp("some")
        for name in names:
            shutil.copytree(fashion / name, root / "images" / name)
        pack(root / "images", root / "packed", PackOptions())
        return root / "packed"

    return pack_some


def test_validation_lacks_classes_in_the_middle(configure, packed_classes):
    config = configure(f"data.val={packed_classes('Ankle_boot', 'Coat', 'Trouser')}")
    plan = make_plan(config, 0, 1)
    assert [plan.class_names[label] for label in plan.val_label_map] == list(plan.val.classes)
    assert plan.num_classes == 10
    assert describe(config, plan)["validation images"] == f"{len(plan.val)}, of 3 classes out of 10"


def test_a_single_class_is_an_error(configure, packed_classes):
    folder = packed_classes("Bag")
    message = f"{folder} has images of a single class, Bag, and there is nothing to tell apart; pack"
    with pytest.raises(ValueError, match=message):
        make_plan(configure(f"data.train={folder}"), 0, 1)
    make_plan(configure(f"data.val={folder}"), 0, 1)


def test_a_single_class_with_images_is_an_error(configure, fashion, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(fashion / "Bag", tmp_path / "images" / "Bag")
    (tmp_path / "names.txt").write_text("Ankle_boot\nBag\n")
    pack(tmp_path / "images", folder, PackOptions(classes=tmp_path / "names.txt"))
    with pytest.raises(ValueError, match=f"{folder} has images of a single class, Bag, and there"):
        make_plan(configure(f"data.train={folder}"), 0, 1)


def test_a_batch_too_small_for_batchnorm_is_an_error(configure, small_config, capsys):
    """The rejected batch does fail in the model, and those that the message names do not."""
    message = (
        "a batch of 1 image per rank at 32² pixels leaves BatchNorm a single value per channel; use"
        " optimizer.global_batch_size=8, or data.image_size=64"
    )
    small = "optimizer.global_batch_size=4", "optimizer.gradient_accumulation_steps=2"
    with pytest.raises(ValueError, match=message):
        make_plan(configure(*small), 0, 2)
    named = [configure(*small, "optimizer.global_batch_size=8"), configure(*small, "data.image_size=64")]
    model = timm.create_model("polaformerpp_b0", num_classes=10)
    for config in named:
        size = config.data.image_size
        model(torch.zeros(make_plan(config, 0, 2).loader_options.micro_batch_size, 3, size, size))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.zeros(1, 3, 32, 32))


def test_groups_of_batchnorm(configure):
    """128 samples where the micro-batch is a multiple of them, else the micro-batch, unless the configuration says."""
    for batch, overrides, expected in (
        (256, [], 128),
        (128, [], 128),
        (192, [], 192),
        (32, [], 32),
        (32, ["model.norm_group=8"], 8),
        (256, ["model.norm_group=256"], 256),
    ):
        config = configure(f"optimizer.global_batch_size={2 * batch}", *overrides)
        plan = make_plan(config, 0, 2)
        assert plan.norm_group == expected
        assert describe(config, plan)["BatchNorm"] == f"statistics of groups of {expected} samples"


@pytest.mark.parametrize(("group", "remedy"), [(5, "4 or 6"), (7, "6 or 8"), (48, "24")])
def test_a_group_that_does_not_divide_the_batch_is_an_error(configure, group, remedy):
    message = f"model.norm_group {group} does not divide the batch of 24 images per rank and micro-step; use {remedy}$"
    overrides = "optimizer.global_batch_size=96", "optimizer.gradient_accumulation_steps=2"
    with pytest.raises(ValueError, match=message):
        make_plan(configure(*overrides, f"model.norm_group={group}"), 0, 2)
    for value in remedy.split(" or "):
        make_plan(configure(*overrides, f"model.norm_group={value}"), 0, 2)


def test_a_group_of_one_image_is_an_error_where_batchnorm_has_one_value(configure):
    overrides = "optimizer.global_batch_size=9", "model.norm_group=1"
    message = (
        "model.norm_group 1 at 32² pixels leaves BatchNorm a single value per channel; use model.norm_group=3, or"
        " data.image_size=64"
    )
    with pytest.raises(ValueError, match=message):
        make_plan(configure(*overrides), 0, 1)
    assert make_plan(configure(*overrides, "data.image_size=64"), 0, 1).norm_group == 1
    assert make_plan(configure(*overrides, "model.norm_group=3"), 0, 1).norm_group == 3


def test_a_resumed_run_keeps_its_groups_of_batchnorm(configure):
    """Where the new micro-batch is a multiple of them, and the configuration does not say otherwise."""

    def resumed(saved: int, ranks: int, *overrides: str) -> tuple[int, list[str]]:
        config = configure("optimizer.global_batch_size=32", *overrides)
        plan, changes = keep_norm_group(config, make_plan(config, 0, ranks), saved)
        return plan.norm_group, changes

    def change(text: str) -> list[str]:
        return [
            f"BatchNorm's groups change {text} samples: from here on, results differ from those of a run without this"
            " change"
        ]

    assert resumed(8, 1) == (8, [])
    assert resumed(8, 4) == (8, [])
    assert resumed(16, 4) == (8, change("from 16 to 8"))
    assert resumed(8, 1, "model.norm_group=16") == (16, change("from 8 to 16"))
    assert resumed(8, 1, "model.norm_group=8") == (8, [])


def test_an_output_that_is_no_folder_is_an_error(configure, tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(tmp_path / "gone")
    for output, words in (
        (file, f"{file} is a file"),
        (file / "x", f"{file} is a file"),
        (link, f"{link} is a broken"),
    ):
        with pytest.raises(ValueError, match=f"output is {output}, and {words}.*; choose another folder"):
            make_plan(configure(f"output={output}"), 0, 1)
    (tmp_path / "real").mkdir()
    link.unlink()
    link.symlink_to(tmp_path / "real")
    make_plan(configure(f"output={link}"), 0, 1)


def test_an_output_without_write_permission_is_an_error(tmp_path):
    """Checked as a user without privileges, since root has all permissions."""
    printed = tmp_path / "printed"
    with open(printed, "w") as file:
        if (child := os.fork()) == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                check_output(Path("/runs/x"))
            except ValueError as error:
                file.write(str(error))
            finally:
                file.flush()
                os._exit(0)
        os.waitpid(child, 0)
    assert (
        printed.read_text()
        == "output is /runs/x, and / may not be written to; make it writable, or choose another folder"
    )


def test_a_class_without_an_output_is_an_error(configure):
    message = "has 10 classes, the model has 9 outputs; set model.num_classes to 10, or leave it out"
    with pytest.raises(ValueError, match=message):
        make_plan(configure("model.num_classes=9"), 0, 1)


@pytest.mark.parametrize(
    ("order", "scheme", "name"),
    [
        ("auto", "", "full"),
        ("auto", "file://", "windowed by 16 shards"),
        ("full", "file://", "full"),
        ("windowed", "", "windowed by 16 shards"),
    ],
)
def test_remote_shards_are_shuffled_in_windows(configure, fashion_shards, tmp_path, order, scheme, name):
    paths = [f"data.{part}={scheme}{fashion_shards / part}" for part in ("train", "val")]
    plan = make_plan(configure(*paths, f"data.shuffle={order}", f"data.cache={tmp_path / 'cache'}"), 0, 1)
    assert str(plan.loader_options.sampler(plan.train)) == name
    assert (plan.train.location, plan.val.location) == tuple(path.partition("=")[2] for path in paths)
    assert len(plan.train) + len(plan.val) == 400


def test_the_window_is_configurable(configure):
    plan = make_plan(configure("data.shuffle=windowed", "data.shuffle_window_shards=5", "data.max_bad_samples=3"), 0, 1)
    assert (plan.loader_options.shuffle_window_shards, plan.loader_options.max_bad_samples) == (5, 3)


def test_too_small_a_cache_for_both_sets_is_an_error(configure, fashion_shards, tmp_path):
    """Each set alone fits."""
    bytes_of = {part: (fashion_shards / part / "shard-000000.tar").stat().st_size for part in ("train", "val")}
    gib = (sum(bytes_of.values()) - 1000) / 2**30
    paths = [f"data.{part}=file://{fashion_shards / part}" for part in ("train", "val")]
    message = "a cache of .* GiB is too small, data.train needs .* GiB, data.val needs .* GiB at a time; allow it "
    with pytest.raises(ValueError, match=message):
        make_plan(configure(*paths, f"data.cache={tmp_path / 'cache'}", f"data.cache_gib={gib}"), 0, 1)
    make_plan(configure(paths[0], f"data.cache={tmp_path / 'cache'}", f"data.cache_gib={gib}"), 0, 1)


def test_a_cache_is_shared_by_the_ranks_of_a_machine(configure, many_shards, small_config, tmp_path, capsys):
    """Evaluation needs space for each of them, and none for the ranks of other nodes."""
    train, val = (f"data.{part}={scheme}{many_shards}" for part, scheme in (("train", ""), ("val", "file://")))
    gib = 8.5 * (many_shards / "shard-000000.tar").stat().st_size / 2**30
    options = train, val, f"data.cache={tmp_path / 'cache'}", f"data.cache_gib={gib}", "optimizer.global_batch_size=16"
    make_plan(configure(*options), rank=0, world_size=8, local_world_size=2)
    with pytest.raises(ValueError, match=r"a cache of .* GiB is too small, data.val needs .* GiB at a time"):
        make_plan(configure(*options), rank=0, world_size=8)
    plan = "--config", str(small_config), "--world-size", "8", f"output={tmp_path / 'run'}", *options
    assert main(plan) == 2
    assert "data.val needs" in capsys.readouterr().err
    assert main([*plan, "--nodes", "4"]) == 0
    with pytest.raises(SystemExit):
        main([*plan, "--nodes", "3"])
    assert "8 ranks are not spread evenly over 3 nodes; use a divisor of 8" in capsys.readouterr().err


def test_the_default_cache_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    options = cache_options(None, 1.5, "/data", "https://host/data")
    assert options.folder == tmp_path / f"polaformer-shards-{os.getuid()}"
    assert options.folder.stat().st_mode & 0o777 == 0o700
    assert options.limit_bytes == 1.5 * 2**30
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_options(None, 1.5, "/data").folder == tmp_path / "caches" / "polaformer-shards"
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize("fault", ["writable", "writable for a group", "file", "foreign", "foreign link"])
def test_a_default_cache_folder_of_others_is_an_error(small_config, tmp_path, monkeypatch, capsys, fault):
    """Nothing is fetched into it, and its owner is irrelevant if all data are on a local disk."""
    folder = tmp_path / f"polaformer-shards-{os.getuid()}"
    message = f"{folder}, the default for remote shards, belongs to user 12345; name"
    if fault.startswith("writable"):
        folder.mkdir()
        folder.chmod(0o777 if fault == "writable" else 0o770)
        message = f"{folder}, the default for remote shards, may be written to by other users; name"
    elif fault == "file":
        folder.write_text("")
        message = f"cannot keep remote shards in {folder}: File exists; name"
    elif os.getuid() != 0:
        pytest.skip("needs the right to give a folder away")
    elif fault == "foreign":
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    else:
        folder.symlink_to(tmp_path)
        os.lchown(folder, 12345, 12345)
    before = list(tmp_path.rglob("*"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    plan = "--config", str(small_config), f"output={tmp_path / 'run'}"
    assert main([*plan, f"data.train=file://{tmp_path}/none"]) == 2
    assert capsys.readouterr().err == f"error: {message} a folder of your own with data.cache, --cache\n"
    assert list(tmp_path.rglob("*")) == before
    assert main(plan) == 0


def test_a_missing_remote_folder_is_an_error(small_config, tmp_path, capsys):
    paths = f"data.train=file://{tmp_path}/none", f"data.cache={tmp_path / 'cache'}"
    assert main(["--config", str(small_config), f"output={tmp_path / 'run'}", *paths]) == 2
    message = f"error: cannot fetch file://{tmp_path}/none/manifest.json: it is not there; check the address, and that"
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


def test_missing_shards_are_an_error(configure, tmp_path):
    message = f"no manifest.json in {tmp_path}; write shards there with: python -m dataio.pack SOURCE {tmp_path}"
    with pytest.raises(FileNotFoundError, match=message):
        make_plan(configure(f"data.train={tmp_path}"), 0, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.crop_scale=[0.9, 0.1]", r"crop_scale is \[0.9, 0.1\]; give the smaller one first"),
        ("data.crop_ratio=[2, 1]", r"crop_ratio is \[2.0, 1.0\]; give the smaller one first"),
    ],
)
def test_empty_ranges_are_errors(configure, override, message):
    with pytest.raises(ValueError, match=message):
        make_plan(configure(override), 0, 1)


def test_color_jitter_with_rand_augment_is_an_error(configure):
    message = "color_jitter is 0.4, and RandAugment replaces it; set it to 0, or augmentation to simple"
    with pytest.raises(ValueError, match=message):
        make_plan(configure("data.augmentation=rand-augment", "data.color_jitter=0.4"), 0, 1)


def test_the_description(configure):
    config = configure("optimizer.global_batch_size=64", "optimizer.epochs=16", "engine.zero_stage=2")
    plan = make_plan(config, 0, 2)
    described = describe(config, plan)
    assert described["model"] == "polaformerpp_b0, 10 classes, 32² pixels"
    assert described["training images"] == f"{len(plan.train)} in 1 shards, order full"
    assert described["batch"] == "64 = 2 ranks × 1 accumulation × 32"
    assert described["engine"] == "ZeRO-2, fp32"
    start, peak, last = map(float, described["learning rate"].split(" → "))
    assert (start, peak) == (pytest.approx(1e-5 / 8, rel=1e-2), 1.6e-2 / 8)
    assert 1e-5 / 8 < last < 0.01 * peak


@pytest.mark.slow
def test_the_command(command, small_config, tmp_path, capsys):
    plan = "--config", str(small_config), "--world-size", "4", f"output={tmp_path / 'run'}"
    finished = command("-m", "launch.plan", *plan, "optimizer.global_batch_size=32")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "32 = 4 ranks × 1 accumulation × 8" in finished.stdout
    assert "polaformerpp_b0, 10 classes, 32² pixels" in finished.stdout
    assert not (tmp_path / "run").exists()

    assert main([*plan, "optimizer.global_batch_size=30"]) == 2
    message = "error: global batch 30 is not divisible by 4 ranks × 1 accumulation; use 28 or 32, or 3 or 5 ranks\n"
    assert capsys.readouterr() == ("", message)
