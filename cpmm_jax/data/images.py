"""Folders of images: IDX files (as of MNIST), CIFAR's binary batches, and PNG files.

What a file claims is compared with its size before anything is allocated, no link is followed out
of a folder of PNG files, and pickles (CIFAR's Python version) are never loaded.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpmm_jax.data.binary import DEFLATE_RATIO, read_idx, reading
from cpmm_jax.data.checks import listing, show, show_path
from cpmm_jax.data.dataset import PARTS, Part
from cpmm_jax.data.parts import RawPart
from cpmm_jax.errors import DataError

FOLDER_KINDS = (
    "IDX (train-images-idx3-ubyte, ...), CIFAR (data_batch_1.bin, ..., or train.bin) "
    "or PNG files (*.png, CLASS/*.png, train/CLASS/*.png)"
)
_IDX_PREFIXES: dict[Part, str] = {"train": "train", "test": "t10k"}
_CIFAR_SHAPE = (3, 32, 32)  # channels first, each channel row by row
_PNG_MODES = ("L", "RGB")
_PNG_DEPTH_AT = 24  # after the signature, the first chunk's length and name, width and height


class _Cifar(NamedTuple):
    """The files of one of the two CIFAR sets and the layout of their records.

    A record is `label_bytes` bytes, the last of which is the class, and the pixels
    (https://www.cs.toronto.edu/~kriz/cifar.html).
    """

    train: tuple[str, ...]
    test: str
    class_names: str
    label_bytes: int
    num_classes: int


_CIFAR_SETS = (
    _Cifar(
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
        10,
    ),
    _Cifar(("train.bin",), "test.bin", "fine_label_names.txt", 2, 100),
)


def read_folder(path: Path) -> list[RawPart]:
    """Return the parts of a folder of images, the training part first.

    Images are (N, H, W) where they are grey and (N, H, W, 3) where they are RGB. See `load` for the
    files that a folder may hold.

    Raises:
        DataError: none of these files, or some that are missing, damaged, foreign or do not go
            together.
    """
    with reading(path, "folder"):
        held = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        parts = _read_parts(path, held)
    if not parts or parts[0].part != "train":
        files = f"files {listing([show(name) for name in held])}" if held else "no files"
        remedy = (
            "take CIFAR's binary version: pickles are never loaded"
            if "data_batch_1" in held
            else "check the path, and that the training part is there"
        )
        raise DataError(
            f"the folder {show_path(path)} must hold {FOLDER_KINDS}; got {files}; {remedy}."
        )
    return parts


def _read_parts(path: Path, held: list[str]) -> list[RawPart]:
    if parts := _read_idx_parts(path, held):
        return parts
    for kind in _CIFAR_SETS:
        if not {*kind.train, kind.test}.isdisjoint(held):
            return _read_cifar(path, kind, held)
    return _read_png_parts(path)


def _read_idx_parts(path: Path, held: list[str]) -> list[RawPart]:
    parts = []
    for part, prefix in _IDX_PREFIXES.items():
        images = _idx_file(held, f"{prefix}-images")
        if images is None:
            continue
        codes = _idx_file(held, f"{prefix}-labels")
        y = None if codes is None else read_idx(path / codes)
        parts.append(RawPart(part, read_idx(path / images), y, images, codes or ""))
    return parts


def _idx_file(held: list[str], stem: str) -> str | None:
    """Return the file of that stem; sorted, the plain one comes before the compressed one."""
    pattern = re.compile(re.escape(stem) + r"[-.]idx[0-9]-ubyte(\.gz)?")
    return next((name for name in held if pattern.fullmatch(name)), None)


def _read_cifar(path: Path, kind: _Cifar, held: list[str]) -> list[RawPart]:
    missing = [name for name in kind.train if name not in held]
    if missing:
        raise DataError(
            f"the folder {show_path(path)} must hold {', '.join(kind.train)}; "
            f"got no {listing(missing)}; fetch CIFAR's binary version again."
        )
    files: dict[Part, tuple[str, ...]] = {"train": kind.train}
    if kind.test in held:
        files["test"] = (kind.test,)
    names = None
    if kind.class_names in held:
        names = _read_names(path / kind.class_names, kind.num_classes)
    parts = []
    for part, batches in files.items():
        records = np.concatenate([_read_records(path / name, kind) for name in batches])
        codes = records[:, kind.label_bytes - 1]
        pixels = records[:, kind.label_bytes :].reshape(-1, *_CIFAR_SHAPE)
        y = codes if names is None else names[codes]
        parts.append(RawPart(part, pixels.transpose(0, 2, 3, 1), y, part, f"labels of {part}"))
    return parts


def _read_records(path: Path, kind: _Cifar) -> npt.NDArray[np.uint8]:
    """Return the records of one batch, (N, label bytes and pixels), N >= 1."""
    length = kind.label_bytes + int(np.prod(_CIFAR_SHAPE))
    with reading(path, "CIFAR batch"):
        size = path.stat().st_size
        if size == 0 or size % length:
            raise DataError(
                f"{show_path(path)} must hold whole records of {length} bytes; got {size} bytes "
                "(truncated or foreign); fetch the file again."
            )
        records = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, length)
    # The format has no magic number: the labels are what can tell that a file is another one.
    codes = records[:, kind.label_bytes - 1]
    if codes.max() >= kind.num_classes:
        first = int(np.argmax(codes >= kind.num_classes))
        raise DataError(
            f"{show_path(path)} must hold labels 0..{kind.num_classes - 1}; got {codes[first]} in "
            f"record {first} (counting from 0; a foreign file); fetch the file again."
        )
    return records


def _read_names(path: Path, count: int) -> npt.NDArray[np.str_]:
    """Return the names of the classes, one a line, in the order of their codes."""
    with reading(path, "text file of class names"):
        lines = path.read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    if len(names) != count or len(set(names)) != count:
        raise DataError(
            f"{show_path(path)} must hold {count} different class names, one a line; "
            f"got {len(set(names))}; fetch the file again, or take it away."
        )
    return np.array(names)


def _read_png_parts(path: Path) -> list[RawPart]:
    """Return the parts of a folder of PNG files; none where it holds no such file."""
    root = path.resolve()
    loose, folders = _entries(path, root)
    named = {folder.name: folder for folder in folders}
    if named.keys().isdisjoint(PARTS):
        places: dict[Part, Path] = {"train": path}
    else:
        places = {part: named[part] for part in PARTS if part in named}
        others = [show(entry.name) for entry in loose + folders if entry.name not in PARTS]
        if others or "train" not in places:
            raise DataError(
                f"the folder {show_path(path)} must be divided into train, valid and test, of "
                f"which train is needed; got {listing([*places, *others])}; rename or move them."
            )
    found = {part: _labelled(place, root) for part, place in places.items()}
    files = [file for images, _ in found.values() for file in images]
    if not files:
        return []
    pixels, parts, end = _read_alike(files, path), [], 0
    for part, (images, labels) in found.items():
        if not images:
            raise _no_images(places[part])
        start, end = end, end + len(images)
        y = None if labels is None else np.array(labels)
        parts.append(RawPart(part, pixels[start:end], y, part, f"folders of {part}"))
    return parts


def _entries(folder: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """Return the PNG files and the folders in a folder, each in the order of their names."""
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in visible if entry.is_dir()]
    images = [entry for entry in visible if entry.suffix.lower() == ".png" and not entry.is_dir()]
    for entry in images + folders:
        # A pipe would be read for ever.
        regular = entry.is_dir() or entry.is_file()
        if not regular or (entry.is_symlink() and not entry.resolve().is_relative_to(root)):
            raise DataError(
                f"{show_path(entry)} must be a file or folder inside {show_path(root)}; got a "
                "link that leads elsewhere, or no regular file; put a copy in its place."
            )
    return images, folders


def _labelled(folder: Path, root: Path) -> tuple[list[Path], list[str] | None]:
    """Return the PNG files of one part, and their labels where they lie in folders of classes."""
    loose, classes = _entries(folder, root)
    if not classes:
        return loose, None
    if loose:
        raise DataError(
            f"the folder {show_path(folder)} must hold either PNG files or one folder of them per "
            f"class; got both, {show(loose[0].name)} and the folder {show(classes[0].name)}; "
            "move one of them."
        )
    groups = {place.name: _entries(place, root)[0] for place in classes}
    files = [file for images in groups.values() for file in images]
    for place in classes:
        if files and not groups[place.name]:
            raise _no_images(place)
    return files, [name for name, images in groups.items() for _ in images]


def _no_images(folder: Path) -> DataError:
    return DataError(
        f"the folder {show_path(folder)} must hold PNG files; got none; take it away, or convert "
        "its images."
    )


def _read_alike(files: list[Path], folder: Path) -> npt.NDArray[np.uint8]:
    """Return the pixels of PNG files of one size and mode, (N, H, W) or (N, H, W, 3)."""
    images: list[npt.NDArray[np.uint8]] = []
    for file in files:
        pixels = read_png(file)
        if images and pixels.shape != images[0].shape:
            raise DataError(
                f"{show_path(file)} must be of the size and mode of "
                f"{show_path(files[0].relative_to(folder))}, {_size(images[0])}; "
                f"got {_size(pixels)}; bring all images to one size and mode."
            )
        images.append(pixels)
    return np.stack(images)


def _size(pixels: npt.NDArray[np.uint8]) -> str:
    height, width = pixels.shape[:2]
    return f"{height} x {width} {'grey' if pixels.ndim == 2 else 'RGB'}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "PNG files must be read with Pillow; got no such package here; "
            "install it (it comes with matplotlib): pip install 'cpmm_jax[plot]'."
        ) from error
    return Image


def read_png(path: Path) -> npt.NDArray[np.uint8]:
    """Return the pixels of a PNG file of 8 bits: (H, W) where grey, (H, W, 3) where RGB.

    Raises:
        DataError: unreadable, damaged (every checksum is verified) or foreign, more pixels than its
            bytes can hold or than Pillow takes, another mode or depth, or no Pillow.
    """
    image_module = _pillow()
    what = show_path(path)
    with reading(path, "PNG file"), path.open("rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("error", image_module.DecompressionBombWarning)
        try:
            with image_module.open(stream, formats=("PNG",)) as image:
                stream.seek(_PNG_DEPTH_AT)
                _check_png(image, stream.read(1)[0], path.stat().st_size, what)
                image.verify()  # the checksums; the image must be opened anew afterwards
        except (
            image_module.DecompressionBombError,
            image_module.DecompressionBombWarning,
        ) as error:
            raise DataError(
                f"{what} must hold at most {image_module.MAX_IMAGE_PIXELS} pixels, the most that "
                "Pillow takes; got a claim of more (a decompression bomb); cut the image up."
            ) from error
        stream.seek(0)
        with image_module.open(stream, formats=("PNG",)) as image:
            return np.array(image)


def _check_png(image: Any, depth: int, size: int, what: str) -> None:
    """Refuse what a header claims before any pixel is decoded."""
    if image.mode not in _PNG_MODES or depth != 8:
        raise DataError(
            f"{what} must be grey or RGB with 8 bits a channel; got mode {show(image.mode)} with "
            f"{depth} bits; convert it first."
        )
    claimed = image.width * image.height * len(image.getbands())
    if claimed > size * DEFLATE_RATIO:
        raise DataError(
            f"{what} must hold the pixels that its header describes; got {size} packed bytes "
            f"where the header claims {claimed} (truncated or forged); write the file again."
        )
