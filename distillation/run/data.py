"""The data module of a script's flags, and the caches in front of it."""

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dataset.datamodule import SUNRGBDDataModule, SUNRGBDDataset
from dataset.inputs.pictures import ImageSettings, PictureCache, picture_key
from dataset.inputs.processor import ImageTextProcessor
from dataset.loading import follow_the_script
from dataset.miniature.world import ensure_world
from dataset.sunrgbd.frames import picture_size
from distillation.forward import tower_features, vision_tower
from distillation.run.machine import half_dtype, probe, resolve_precision
from utils import ROOT, UserError, amount, data_root, free_space, locked, outputs_root, progress, remove_leftovers

CAMERAS = 200  # frames whose camera is looked at; more would not move a median


def build_data(
    args: argparse.Namespace,
    processor: ImageTextProcessor,
    student: ImageSettings,
) -> SUNRGBDDataModule:
    """The data module of a script's flags, read and checked. The miniature world is rendered on first use."""
    root = data_root(args.miniature)
    if args.miniature and args.dry_run and not root.is_dir():
        raise UserError("--dry_run writes nothing; make the miniature world first: python dataset/miniature/world.py")
    if args.miniature:
        ensure_world(root)
    cache = None
    if args.picture_cache and not args.dry_run:
        folder = outputs_root(ROOT / "distillation" / "picture_cache")
        cache = PictureCache(folder, picture_key(processor, student), student)
    data = SUNRGBDDataModule(
        root=root,
        processor=processor,
        student=student,
        batch_size=args.batch_size,
        accumulate_grad_batches=args.accumulate_grad_batches,
        questions_per_image=args.questions_per_image,
        teacher_questions=args.teacher_questions or 0,
        subset_percentage=args.subset_percentage,
        label_fraction=args.label_fraction or 1.0,
        augmentation=args.augmentation,
        depth_degradation=args.depth_degradation,
        cache=cache,
        num_workers=args.num_workers,
        seed=args.seed,
    )
    data.setup()
    if cache:
        missing = data.images_per_epoch + len(data.val) - len(cache.store.names())
        check_disk("--picture_cache", cache.store.folder, data.train[0, 0]["picture"].tiles.nbytes, missing)
    return data


def usual_camera(dataset: SUNRGBDDataset) -> dict[str, float]:
    """The median camera of evenly spread training frames.

    Returns:
        focal_share: focal length over width. tilt_degrees: by which the camera looks down.
    """
    chosen = sorted({round(i) for i in np.linspace(0, len(dataset) - 1, CAMERAS)})
    frames = [dataset.frame(i) for i in chosen]
    sizes = [picture_size(frame.root / frame.image_path) for frame in frames]  # None: damaged, found when it is read
    shares = [frame.intrinsics[0, 0] / size[0] for frame, size in zip(frames, sizes, strict=True) if size]
    tilts = [np.degrees(np.arcsin(np.clip(frame.tilt[1, 2], -1, 1))) for frame in frames]
    return {"focal_share": round(float(np.median(shares)), 4), "tilt_degrees": round(float(np.median(tilts)), 2)}


def check_disk(what: str, folder: Path, bytes_each: float, n: int, *, others: float = 0) -> None:
    """Say how much will be written for `n` things of this size. Raises UserError when there is no room.

    `others`: bytes that something else needs on the same disk.
    """
    remove_leftovers(folder)
    needed, free = max(n, 0) * bytes_each, free_space(folder) - others
    print(f"{what}: {amount(needed)} to write into {folder}, {amount(free)} free")
    if needed > free:
        raise UserError(
            f"{what}: no room in {folder}, {amount(needed)} needed, {amount(free)} free; make some, or write elsewhere"
        )


def use_vision_cache(student: torch.nn.Module, data: SUNRGBDDataModule, args: argparse.Namespace) -> None:
    """Compute a frozen vision tower's features of every picture once, and train on them, read from disk.

    Exact but for the order of float additions. Features are keyed by the tower's weights, the pictures and the
    precision; what another run has stored is used.

    Raises:
        UserError: the tower trains, or the disk has no room.
    """
    tower = vision_tower(student)
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise UserError("--vision_cache: the vision tower trains here, its features change; leave it out")
    precision = resolve_precision(args.precision, args.accelerator)
    key = picture_key(data.processor, data.student) | {"tower": weights_digest(tower), "precision": precision}
    cache = PictureCache(outputs_root(ROOT / "distillation" / "vision_cache"), key, data.student)
    device, half = probe(args).strategy.root_device, half_dtype(precision)
    with locked(cache.store.folder), torch.no_grad(), torch.autocast(device.type, half, enabled=half is not None):
        for dataset in (data.train, data.val):
            store_features(student.to(device), dataset, cache, args)
    data.use_features(cache)


def weights_digest(model: torch.nn.Module) -> str:
    """Hex digest of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def store_features(
    student: torch.nn.Module, dataset: SUNRGBDDataset, cache: PictureCache, args: argparse.Namespace
) -> None:
    """Put the vision features of all pictures of a data set into the cache, unless they are there.

    Raises:
        UserError: the disk has no room for what the first picture promises.
    """
    there = cache.store.names()
    missing = [i for i in range(len(dataset)) if cache.name(dataset.frame(i)) not in there]
    cache.digests.save()
    loader = torch.utils.data.DataLoader(
        dataset,
        sampler=[(0, i) for i in missing],
        batch_size=2 * args.batch_size,
        collate_fn=list,
        num_workers=args.num_workers,
        worker_init_fn=follow_the_script,
    )
    device, numbers = next(student.parameters()).device, iter(missing)
    for items in progress(loader, total=len(loader), label="precomputing vision features, batch"):
        pictures = [item["picture"] for item in items]
        tiles = torch.cat([picture.tiles for picture in pictures]).to(device)
        features = tower_features(student, tiles).cpu().contiguous()
        for picture, own in zip(pictures, features.split([len(p.tiles) for p in pictures]), strict=True):
            number = next(numbers)
            if number == missing[0]:
                check_disk("--vision_cache", cache.store.folder, own.nbytes, len(missing))
            cache.put(dataset.frame(number), replace(picture, tiles=own))
