"""Data module: the documented batch, splits, subsets, resumable order, augmentation, errors that name the file."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.datamodule import SUNRGBDDataModule
from dataset.inputs import pictures
from dataset.inputs.augmentation import augment
from dataset.inputs.degradations import Degradation
from dataset.inputs.depth_encodings import ENCODINGS
from dataset.inputs.pictures import ImageSettings, PictureCache, load_images, picture_key
from dataset.inputs.sampler import ImageOrder, MicroBatchSampler
from dataset.questions.rows import frame_path, group_by_image, questions_file, read_questions, subset_of_images
from dataset.sunrgbd.depth import unproject
from dataset.sunrgbd.frames import read_frame
from utils import UserError

RGB, DEPTH, BLIND = (ImageSettings(m, image_tokens="one_tile") for m in ("rgb", "depth", "blind"))


def module(world, processor, **options) -> SUNRGBDDataModule:
    options = {"student": DEPTH, "batch_size": 3, **options}
    data = SUNRGBDDataModule(root=world, processor=processor, **options)
    data.setup()
    return data


@pytest.mark.parametrize("student", [RGB, DEPTH, BLIND])
def test_batch_is_as_documented(world, processor, student):
    batch = next(iter(module(world, processor, student=student).train_dataloader()))
    B, T = batch["text"]["input_ids"].shape
    assert B == 3 == len(batch["question_ids"]) == len(batch["image_paths"])
    for name in ("input_ids", "position_ids", "labels"):
        assert batch["text"][name].shape == (B, T) and batch["text"][name].dtype == torch.int64
    mask, blocks = batch["text"]["attention_mask"], batch["text"]["segments"].gt(0).any(0)
    assert mask.shape == (B, 1, int(blocks.sum()), T) and blocks[-mask.shape[2] :].all() and mask.dtype == torch.bool
    images = batch["student_images"]
    if student is BLIND:
        assert images == {}
    else:
        assert images["pixel_values"].shape == (B, 1, 3, 128, 128)
        assert images["pixel_values"].dtype == torch.float32 and torch.isfinite(images["pixel_values"]).all()
        assert images["image_sizes"].tolist() == [[128, 128]] * B
    placeholders = (batch["text"]["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert placeholders == [0 if student is BLIND else 65] * B
    assert "teacher" not in batch


def test_every_image_once_per_epoch_and_no_image_in_two_splits(world, processor):
    data = module(world, processor)
    seen = Counter(path for batch in data.train_dataloader() for path in batch["image_paths"])
    assert set(seen.values()) == {1} and len(seen) == len(data.train)
    splits = [{row.image_path for row in data.rows(split)} for split in ("train", "val", "test")]
    assert all(splits) and not (splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2])


def test_subset_is_nested_and_checked(world):
    rows = read_questions(questions_file(world, "train"), root=world)
    small, large = (subset_of_images(rows, share, seed=3) for share in (0.25, 0.5))
    assert len(group_by_image(large)) == round(0.5 * len(group_by_image(rows)))
    assert {r.id for r in small} < {r.id for r in large} < {r.id for r in rows}
    for share in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(UserError, match="--subset_percentage"):
            subset_of_images(rows, share, seed=0)


def test_questions_per_image_caps_and_takes_turns(world, processor):
    data = module(world, processor, questions_per_image=2)
    most = max(len(rows) for rows in data.train.images)
    for index, rows in enumerate(data.train.images):
        drawn = Counter(row.id for epoch in range(most) for row in data.train[epoch, index]["rows"])
        assert len(drawn) == len(rows) and max(drawn.values()) - min(drawn.values()) <= 1
        assert len(data.train[0, index]["rows"]) == min(2, len(rows))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [23, 60])
def test_order_is_a_function_of_position(world_size, size):
    """Resuming at any step yields exactly the rest; ranks take equally many steps and divide one process's images."""
    ranks = [
        MicroBatchSampler(ImageOrder(23, seed=1, shuffle=True, size=size), 4, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    full = []
    for sampler in ranks:
        sampler.sampler.set_epoch(2)
        full.append(list(sampler))
        assert len(full[-1]) == len(sampler) == len(full[0])
        for start in range(len(sampler)):
            sampler.start = start
            assert list(sampler) == full[-1][start:]
        assert list(sampler) == full[-1]  # `start` is for the resumed epoch only
    counted = [
        key
        for step in range(len(full[0]))
        for sampler, batches in zip(ranks, full, strict=True)
        if not sampler.is_spare(step)
        for key in batches[step]
    ]
    alone = ImageOrder(23, seed=1, shuffle=True, size=size)
    alone.set_epoch(2)
    assert counted == list(alone) and len(set(counted)) == size  # none twice to fill up
    assert {index for _, index in counted} == set(range(23))
    ranks[0].sampler.set_epoch(3)
    assert list(ranks[0]) != full[0]


def test_augmentation_is_keyed_by_epoch_and_image(world, processor):
    data = module(world, processor, augmentation=True)
    first, again, other = (data.train[key]["picture"].tiles for key in ((0, 1), (0, 1), (1, 1)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    plain = module(world, processor)
    assert torch.equal(plain.train[0, 1]["picture"].tiles, plain.train[7, 1]["picture"].tiles)


@pytest.mark.parametrize("image_tokens", ["one_tile", "anyres"])
def test_cached_pictures_are_the_pictures(world, processor, tmp_path, image_tokens):
    """First use, second use, a damaged file, a half file, another process: always the very same batch."""
    student = ImageSettings("depth", image_tokens=image_tokens)
    cache = PictureCache(tmp_path, picture_key(processor, student), student)
    plain, cached = (module(world, processor, student=student, cache=c) for c in (None, cache))

    def same() -> bool:
        batches = [data.collate([data.train[0, i] for i in range(4)]) for data in (plain, cached)]
        assert all(
            torch.equal(a, b) for a, b in zip(*(batch["student_images"].values() for batch in batches), strict=True)
        )
        pictures = [data.train[0, 2]["picture"] for data in (plain, cached)]
        return torch.equal(pictures[0].valid_share, pictures[1].valid_share)

    assert same()
    files = sorted(cache.store.folder.rglob("*.tensors"))
    assert len(files) == 4
    before = [path.read_bytes() for path in files]
    assert same() and [path.read_bytes() for path in files] == before
    files[0].write_bytes(before[0][:-1] + bytes([before[0][-1] ^ 1]))
    files[1].write_bytes(before[1][:1000])
    files[2].write_bytes(b"")
    assert same() and [path.read_bytes() for path in files] == before
    assert not list(tmp_path.rglob("*.part"))


def test_picture_cache_knows_what_a_picture_is_made_from(world, processor, tmp_path):
    """Another encoding, tile mode, camera or depth picture is another file."""
    data = module(world, processor)
    frame = read_frame(world, frame_path(data.train.images[0][0]))
    other = read_frame(world, frame_path(data.train.images[1][0]))
    settings = [DEPTH, replace(DEPTH, depth_encoding="grey"), replace(DEPTH, image_tokens="anyres"), RGB]
    assert len({PictureCache(tmp_path, picture_key(processor, s), s).store.folder for s in settings}) == len(settings)
    cache, made = PictureCache(tmp_path, picture_key(processor, DEPTH), DEPTH), []

    def make():
        made.append(len(made))
        return data.train[0, 0]["picture"]

    for shown in (frame, frame, other, replace(frame, intrinsics=frame.intrinsics * 1.1), frame):
        cache.get(shown, make)
    assert len(made) == 3


def test_augmentation_keeps_rgb_and_depth_registered():
    """A block that is red and near stays red and near in the same pixels; color never reaches the depth."""
    rgb = np.full((96, 96, 3), 90, np.uint8)
    depth_m = np.full((96, 96), 3.0, np.float32)
    rgb[30:60, 50:80] = (220, 20, 20)
    depth_m[30:60, 50:80] = 1.0
    intrinsics = np.array([[100.0, 0, 47.5], [0, 100.0, 47.5], [0, 0, 1]])
    for seed in range(5):
        rng = np.random.default_rng
        both = augment(rgb, depth_m, intrinsics=intrinsics, tilt=np.eye(3), rng=rng(seed))
        alone = augment(None, depth_m, intrinsics=intrinsics, tilt=np.eye(3), rng=rng(seed))
        np.testing.assert_array_equal(both[1], alone[1])
        assert both[0].shape[:2] == both[1].shape
        red, near = both[0][..., 0] > 150, (both[1] > 0.5) & (both[1] < 2)
        measured = both[1] > 0
        assert (red & near).sum() > 0.93 * (red & measured).sum() > 300


def test_rolled_points_keep_their_place_in_the_gravity_frame():
    """After roll and crop, unprojecting with the new camera still gives the old floor."""
    intrinsics = np.array([[100.0, 0, 47.5], [0, 100.0, 47.5], [0, 0, 1]])
    pitch = np.radians(25)
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    y_per_metre = unproject(np.ones((96, 96), np.float32), intrinsics) @ tilt[1]
    floor = np.where(y_per_metre > 0.25, 1.4 / np.maximum(y_per_metre, 0.01), 0).astype(np.float32)
    for seed in range(5):
        _, depth_m, new_intrinsics, new_tilt = augment(
            None, floor, intrinsics=intrinsics, tilt=tilt, rng=np.random.default_rng(seed)
        )
        np.testing.assert_allclose(new_tilt @ new_tilt.T, np.eye(3), atol=1e-12)
        seen = depth_m > 0
        y = (unproject(depth_m, new_intrinsics) @ new_tilt[1])[seen]
        assert abs(np.median(y) - 1.4) < 0.02 and np.percentile(abs(y - 1.4), 90) < 0.15


def first_frame(root):
    row = read_questions(questions_file(root, "train"), root=root)[0]
    return row, read_frame(root, frame_path(row))


def test_other_code_or_libraries_make_other_pictures(processor, tmp_path, monkeypatch):
    shutil.copytree(
        pictures.ROOT / "dataset", tmp_path / "dataset", ignore=shutil.ignore_patterns("miniature", "__pycache__")
    )
    monkeypatch.setattr(pictures, "ROOT", tmp_path)

    def folder() -> Path:
        return PictureCache(tmp_path, picture_key(processor, DEPTH), DEPTH).store.folder

    seen = [folder()]
    for name in ("questions/generate.py", "sunrgbd/frames.py", "inputs/split_off.py"):
        with open(tmp_path / "dataset" / name, "a") as source:
            source.write("\n")
        seen.append(folder())
    monkeypatch.setattr(pictures.np, "__version__", "99.0")
    seen.append(folder())
    assert seen[0] == seen[1] and len(set(seen[1:])) == 4


def test_bad_pictures_name_the_file(own_world):
    row, frame = first_frame(own_world)
    depth = own_world / frame.depth_path
    depth.write_bytes(depth.read_bytes()[:200])
    with pytest.raises(UserError, match=depth.name):
        load_images(frame, [DEPTH])
    picture = own_world / frame.image_path
    picture.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=picture.name):
        load_images(frame, [RGB])
    picture.unlink()
    with pytest.raises(UserError, match="image"):
        read_frame(own_world, frame_path(row))


def test_unregistered_pictures_are_refused(own_world):
    from PIL import Image

    row, frame = first_frame(own_world)
    Image.new("RGB", (64, 64)).save(own_world / frame.image_path)
    with pytest.raises(UserError, match="registered"):
        read_frame(own_world, frame_path(row))


def test_bfx_source(world):
    _, frame = first_frame(world)
    (filled,) = load_images(frame, [ImageSettings("depth", depth_source="bfx")])
    (raw,) = load_images(frame, [DEPTH])
    assert np.isfinite(filled).all() and np.isnan(raw).any()


def shown(loader, epoch: int) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """By picture: its pixels in an epoch, and the weights of its patches where a teacher reads them."""
    loader.batch_sampler.sampler.set_epoch(epoch)
    return {
        path: (pixels, weights)
        for batch in loader
        for path, pixels, weights in zip(
            batch["image_paths"],
            batch["student_images"]["pixel_values"],
            batch.get("teacher", {}).get("valid_share", [None] * len(batch["image_paths"])),
            strict=True,
        )
    }


class ConstantTeacher:
    """Says the same about every picture."""

    def __init__(self, paths):
        self.rows = {path: row for row, path in enumerate(sorted(paths))}

    def answer(self, row, *, gold):
        return [5], torch.zeros(1, 4)

    def patches(self, image_path):
        return torch.zeros(64, 4)


def test_depth_is_degraded_anew_in_each_epoch_and_patches_keep_the_recorded_weight(world, processor):
    clean, worse = (module(world, processor, depth_degradation=share) for share in (0.0, 0.5))
    for data in (clean, worse):
        data.use_teacher(ConstantTeacher({row.image_path for row in data.rows("train")}))
    recorded = shown(clean.train_dataloader(), 0)
    epochs = [shown(worse.train_dataloader(), epoch) for epoch in range(4)]
    changed = [{path for path in recorded if not epoch[path][0].equal(recorded[path][0])} for epoch in epochs]
    share = sum(map(len, changed)) / (len(epochs) * len(recorded))
    assert 0.3 < share < 0.7 and changed[0] != changed[1]
    twice = changed[0] & changed[1] & changed[2]
    assert all(not epochs[0][path][0].equal(epochs[1][path][0]) for path in twice) and twice
    assert all(epoch[path][1].equal(recorded[path][1]) for epoch in epochs for path in recorded)
    again = shown(worse.train_dataloader(), 1)
    assert all(again[path][0].equal(epochs[1][path][0]) for path in recorded)


def test_validation_sees_depth_as_recorded(world, processor):
    clean, worse = (module(world, processor, depth_degradation=share) for share in (0.0, 1.0))
    first, second = (shown(data.val_dataloader(), 0) for data in (clean, worse))
    assert all(first[path][0].equal(second[path][0]) for path in first) and first


@pytest.mark.parametrize("encoding", [*ENCODINGS])
def test_a_picture_without_any_depth_is_black(world, encoding, recwarn):
    frame = read_frame(world, frame_path(read_questions(questions_file(world, "test"), root=world)[0]))
    settings = ImageSettings("depth", encoding)
    (picture,) = load_images(frame, [settings], degradation=Degradation("no_depth", 1))
    (whole,) = load_images(frame, [settings])
    assert np.isnan(picture).all() and picture.shape == whole.shape and not recwarn.list


def test_a_worse_depth_sensor_leaves_rgb_alone_and_less_light_leaves_depth_alone(world):
    frame = read_frame(world, frame_path(read_questions(questions_file(world, "test"), root=world)[0]))
    rgb, depth = load_images(frame, [RGB, DEPTH])
    dark, same_depth = load_images(frame, [RGB, DEPTH], degradation=Degradation("light", 1 / 64))
    same_rgb, cut = load_images(frame, [RGB, DEPTH], degradation=Degradation("holes", 0.3))
    assert (same_rgb == rgb).all() and np.array_equal(same_depth, depth, equal_nan=True)
    assert dark.mean() < rgb.mean() / 4 and np.isnan(cut).mean() > np.isnan(depth).mean() + 0.15
