"""Pictures to feature vectors: pretrained nets from a folder or torch's own cache, or the model's tokenizer.

Notable choices:
- a net is named in full wherever its numbers appear: a distance on 1280 features of MobileNetV2 is no "FID";
- pictures stream through in small batches, and what was extracted once is kept on disk under the hash of its pixels;
- torchvision takes 2.5 s to import, so it is imported where a net of its is built.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from igpt.checkpoint import Tokenizer
from igpt.files import atomic_write
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover, to_tensor
from tokenizer_vq.vq import VQTokenizer

MOBILENET = "mobilenet_v2.safetensors"
INCEPTION = "inception_v3_2015_trunk_fp16.safetensors"
BATCH = 16
SAVED_EVERY = 4096  # new pictures; a killed extraction loses no more

# Nets


class FeatureNet(nn.Module):
    """Squares [B, 3, side, side] in [-1, 1] to one vector a picture, [B, D]."""

    name: str  # in full, as it stands in reports
    side: int  # pixels
    identity: str  # tells weights apart, for the cache


class MobileNetV2(FeatureNet):
    """The pooled last features of Keras' MobileNetV2 1.0 (Sandler et al. 2018, arXiv 1801.04381), from safetensors."""

    name, side = "MobileNetV2 1280-d", 224

    def __init__(self, file: Path):
        super().__init__()
        from torchvision.models import mobilenet_v2

        net = mobilenet_v2()
        self.identity = _load(net, file)
        self.features = net.features
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                # TensorFlow pads even sides on the right and at the bottom only, where torch pads all around.
                module.padding = (0, 0)
                module.register_forward_pre_hook(lambda _, inputs: (F.pad(inputs[0], (0, 1, 0, 1)),))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled: Tensor = self.features(images_BCHW).mean((2, 3))
        return pooled


class InceptionV3(FeatureNet):
    """The pooled block Mixed_6e of the Inception-v3 of 2015, on which the FID is defined (with 2048 later features)."""

    name, side = "Inception-v3-2015 Mixed_6e 768-d", 299

    def __init__(self, file: Path):
        super().__init__()
        from torchvision.models import inception_v3

        self.blocks = nn.Sequential()
        for name, block in inception_v3(init_weights=False, aux_logits=False).named_children():
            if name == "Mixed_7b":
                break
            self.blocks.add_module(name, block)
        self.identity = _load(self.blocks, file)
        del self.blocks.Mixed_7a  # the file has it, the 768 features come before it
        for block in self.blocks:
            if hasattr(block, "branch_pool"):
                block.branch_pool = nn.Sequential(_InsideOnly(), block.get_submodule("branch_pool"))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled: Tensor = self.blocks(images_BCHW).mean((2, 3))
        return pooled


class _InsideOnly(nn.Module):
    """Turns torchvision's 3x3 averages into TensorFlow's, which count only the pixels inside the picture."""

    def forward(self, averages_BCHW: Tensor) -> Tensor:
        ones = averages_BCHW.new_ones(1, 1, *averages_BCHW.shape[2:])
        return averages_BCHW / F.avg_pool2d(ones, 3, stride=1, padding=1)


class TorchvisionMobileNetV2(FeatureNet):
    """MobileNetV2 with the weights that torchvision has downloaded before."""

    name, side = "MobileNetV2 1280-d (torchvision's weights)", 224
    mean: Tensor
    std: Tensor

    def __init__(self, file: Path):
        super().__init__()
        from torchvision.models import mobilenet_v2

        net = mobilenet_v2()
        try:
            net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
        except Exception as error:  # unpickling has no common error
            raise UserError(f"{file} is not torchvision's MobileNetV2 ({type(error).__name__}); delete it") from error
        self.identity, self.features = _hash(file), net.features
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled: Tensor = self.features(((images_BCHW + 1) / 2 - self.mean) / self.std).mean((2, 3))
        return pooled


class OwnTokenizer(FeatureNet):
    """The model's own encoder, pooled: mean and spread of every channel. (A palette has only colours, on 8x8 places.)

    It sees what this model sees, so its numbers can be compared with nobody else's.
    """

    def __init__(self, tokenizer: Tokenizer, side: int, identity: str):
        super().__init__()
        self.tokenizer, self.side, self.identity = tokenizer, side, identity
        width = 2 * tokenizer.config.channels[-1] if isinstance(tokenizer, VQTokenizer) else 192
        self.name = f"own tokenizer {width}-d (not to be compared with other models or papers)"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if not isinstance(self.tokenizer, VQTokenizer):
            return F.adaptive_avg_pool2d(images_BCHW, 8).flatten(1)
        encoded: Tensor = self.tokenizer.encoder(images_BCHW)
        return torch.cat([encoded.mean((2, 3)), encoded.std((2, 3), correction=0)], dim=1)


def nets(folder: str | None, tokenizer: Tokenizer, side: int, identity: str) -> list[FeatureNet]:
    """The nets there are, the main one first: from `folder`; without one, torchvision's weights if torch's cache has
    them (nothing is ever downloaded); else the tokenizer, for squares of `side` pixels.

    Raises UserError where the folder holds none of the files, or damaged ones.
    """
    if folder is not None:
        kinds: dict[str, type[MobileNetV2 | InceptionV3]] = {MOBILENET: MobileNetV2, INCEPTION: InceptionV3}
        there = {file: kind for file, kind in kinds.items() if (Path(folder) / file).is_file()}
        if not there:
            raise UserError(f"the folder of feature nets {folder!r} has neither {MOBILENET} nor {INCEPTION}")
        found: list[FeatureNet] = [kind(Path(folder) / file) for file, kind in there.items()]
    elif files := sorted(Path(torch.hub.get_dir(), "checkpoints").glob("mobilenet_v2-*.pth")):
        found = [TorchvisionMobileNetV2(files[-1])]
    else:
        found = [OwnTokenizer(tokenizer, side, identity)]
    return [net.eval().requires_grad_(False) for net in found]


def _load(net: nn.Module, file: Path) -> str:
    """Load weights (stored in any precision) strictly; their hash."""
    try:
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in load_file(file).items()}
        net.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"the feature net {file} cannot be read: {str(error).splitlines()[0]}") from error
    return _hash(file)


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# Extraction


class FeatureCache:
    """Vectors on disk, each under the hash of the picture it was made of.

    Every save is a file of its own in a folder of the net, so that nothing is written twice; a damaged file is as good
    as none. Files are mapped, not read: what is known takes next to no memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[bytes, tuple[Tensor, int]] = {}  # the matrix of a file, and the row in it
        self.new: dict[bytes, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._read(path)

    @classmethod
    def of(cls, net: FeatureNet, folder: Path | None = None) -> FeatureCache:
        """The cache of a net, in `folder` or in the user's cache folder."""
        name = hashlib.sha256(f"{net.name}/{net.side}/{net.identity}".encode()).hexdigest()[:24]
        return cls((folder or cache_folder()) / name)

    def _read(self, path: Path) -> None:
        try:
            tensors = load_file(path)
            digests, vectors_ND = tensors["digests"].numpy(), tensors["features"]
        except (OSError, SafetensorError, KeyError):
            return
        self.known.update({digest.tobytes(): (vectors_ND, row) for row, digest in enumerate(digests)})

    def get(self, digest: bytes) -> Tensor | None:
        if digest in self.known:
            vectors_ND, row = self.known[digest]
            return vectors_ND[row]
        return self.new.get(digest)

    def put(self, digest: bytes, vector_D: Tensor) -> None:
        self.new[digest] = vector_D.clone()
        if len(self.new) >= SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Write what is new. Where the disk refuses, the next run has to extract again, that is all."""
        if not self.new:
            return
        digests = torch.frombuffer(bytearray(b"".join(self.new)), dtype=torch.uint8).view(len(self.new), -1)
        tensors = {"digests": digests, "features": torch.stack(list(self.new.values()))}
        path = self.folder / f"{next(iter(self.new)).hex()}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as beside:
                save_file(tensors, beside)
        except (OSError, SafetensorError) as error:
            print(f"igpt: features are not kept for next time: {error}", file=sys.stderr)
        else:
            self._read(path)
        self.new = {}


def cache_folder() -> Path:
    """Where features are kept: igpt/features in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igpt" / "features"


@torch.inference_mode()
def extract(
    net: FeatureNet, pictures: Iterable[Image], count: int, *,
    device: torch.device, cache: FeatureCache | None = None, quiet: bool = False, what: str = "pictures",
) -> Tensor:  # fmt: skip
    """Features [count, D] in float32 on the CPU of `count` pictures, whose largest centred squares the net sees.

    `pictures` is gone through once, a small batch at a time, and no further than it must.
    """
    net = net.to(device)
    features_ND = torch.zeros(0, 0)
    stream, starts = iter(pictures), range(0, count, BATCH)
    try:
        for first in watched(starts, f"{net.name.split(' (')[0]}: {what}", quiet):
            squares = [fit_cover(picture, net.side, net.side) for picture in islice(stream, min(BATCH, count - first))]
            vectors_BD = _vectors(net, squares, cache, device)
            if not first:
                features_ND = vectors_BD.new_empty(count, vectors_BD.shape[1])
            features_ND[first : first + BATCH] = vectors_BD
    finally:
        if cache is not None:
            cache.save()
    return features_ND


def watched(batches: Sequence[int], what: str, quiet: bool) -> Iterable[int]:
    """The same, with a progress line where somebody is watching."""
    hidden = quiet or not sys.stderr.isatty()
    bar: Iterable[int] = tqdm(batches, desc=what, disable=hidden, leave=False)
    return bar


def _vectors(net: FeatureNet, squares: list[Image], cache: FeatureCache | None, device: torch.device) -> Tensor:
    """Features of one batch: what the cache knows, and the rest from the net."""
    digests = [hashlib.sha256(square.tobytes()).digest()[:16] for square in squares]
    found = [cache.get(digest) if cache is not None else None for digest in digests]
    missing = [i for i, vector in enumerate(found) if vector is None]
    if missing:
        images_BCHW = torch.stack([to_tensor(squares[i]) for i in missing]).to(device)
        for i, vector_D in zip(missing, net(images_BCHW).float().cpu(), strict=True):
            found[i] = vector_D
            if cache is not None:
                cache.put(digests[i], vector_D)
    return torch.stack([vector for vector in found if vector is not None])
