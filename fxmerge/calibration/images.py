"""Calibration data from a directory of images, prepared by the network's own transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxmerge.errors import LoaderError, first_line
from fxmerge.networks import Network
from fxmerge.networks.building import HF
from fxmerge.networks.transformers_models import quiet
from fxmerge.sources import package

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")

Transform = Callable[[Any], Tensor]


def read(
    directory: Path, network: Network, samples: int, batch: int, generator: torch.Generator
) -> tuple[list[Tensor], list[Path], str]:
    """Some images of a directory and of those inside of it, in batches; their files; and what prepared them.

    Raises:
        LoaderError: if there are none, one cannot be read, or the network has no transform.
    """
    files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise LoaderError(f"The directory {directory} has no images: no file ends in {', '.join(SUFFIXES)}.")
    chosen = sorted(torch.randperm(len(files), generator=generator)[:samples].tolist())
    files = [files[i] for i in chosen]
    opened: Any = package("PIL.Image").open
    batches, told = prepared([(str(path), partial(opened, path)) for path in files], str(directory), network, batch)
    return batches, files, told


def prepared(
    images: Sequence[tuple[str, Callable[[], Any]]], where: str, network: Network, batch: int
) -> tuple[list[Tensor], str]:
    """Images in batches, and what prepared them.

    Arguments:
        images: what to call each image, and a function that opens it, as PIL has it.
        where: they are from.
        network: whose inputs they are to be.
        batch: how many a batch has at most.

    Raises:
        LoaderError: if one cannot be read, or the network has no transform.
    """
    transform, mode, told = transform_of(network)
    tensors = [_image(*one, transform, mode).to(network.dtype) for one in images]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise LoaderError(f"The images of {where} have the shapes {sorted(shapes)} after the network's transform.")
    return list(torch.stack(tensors).split(batch)), told


def _image(name: str, opened: Callable[[], Any], transform: Transform, mode: str) -> Tensor:
    try:
        with opened() as image:
            return transform(image.convert(mode))
    except Exception as error:
        raise LoaderError(f"The image {name} cannot be read: {first_line(error)}.") from error


def transform_of(network: Network) -> tuple[Transform, str, str]:
    """How the library of a network prepares an image; the mode in which the image has to be; and the former in words.

    Raises:
        LoaderError: if the library is not known to have one.
    """
    size = _size(network)
    mode = "L" if size is not None and size[0] == 1 else "RGB"
    kind, _, name = network.arch.partition(":")
    if kind == "timm":
        data = package("timm.data")
        given = {} if size is None else {"input_size": size}
        config = data.resolve_model_data_config(network.model, args=given)
        if mode == "L":
            config |= {key: tuple(config[key][:1]) for key in ("mean", "std")}
        transform = data.create_transform(**config, is_training=False)
        return transform, mode, _told(transform)
    if kind == "torchvision":
        weights = package("torchvision").models.get_model_weights(name)
        if not len(weights):
            raise LoaderError(f"torchvision has no transform for {name}; pass --data package.module:loader.")
        transforms = next(iter(weights)).transforms
        sizes = {} if size is None else {"crop_size": size[1], "resize_size": size[1]}
        transform = transforms(**sizes)
        return transform, mode, _told(transform)
    if kind == HF:
        try:
            with quiet():
                processor = package("transformers").AutoImageProcessor.from_pretrained(
                    network.directory, local_files_only=True
                )
        except Exception as error:
            raise LoaderError(
                f"{network.directory} has no image processor ({type(error).__name__}). Copy preprocessor_config.json "
                "beside the weights, or pass --data package.module:loader."
            ) from error
        told = f"the {type(processor).__name__} of {network.directory}"
        return lambda image: processor(image, return_tensors="pt")["pixel_values"][0], mode, told
    raise LoaderError(
        f"{network.arch} says nothing of how images are prepared. Pass --data package.module:loader, a .npy or .npz "
        "file, or an architecture of timm, torchvision or hf."
    )


def _told(transform: Any) -> str:
    """A transform in one line."""
    return " ".join(str(transform).split())


def _size(network: Network) -> tuple[int, int, int] | None:
    """Channels, height and width of the example image."""
    source = network.source
    for value in (*source.args, *source.kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 4:
            channels, height, width = value.shape[1:]
            return channels, height, width
    return None
