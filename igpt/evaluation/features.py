"""Pictures to feature vectors: pretrained nets from a folder, or the model's own tokenizer.

A net is named in full wherever its numbers appear: a distance on 1280 features of MobileNetV2 is no "FID". torchvision
takes 2.5 s to import, so only functions import it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from igpt.bundle import Bundle
from igpt.files import atomic_write
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover, to_tensor
from tokenizer_vq.vq import VQTokenizer

from .perceptual import load_weights

MOBILENET = "mobilenet_v2.safetensors"
INCEPTION = "inception_v3_2015_trunk_fp16.safetensors"
BATCH = 8  # pictures in memory at once: LPIPS takes 50 MB for each


@dataclass(frozen=True)
class MetricSpace:
    """Squares of pictures as vectors, and distances between these."""

    name: str  # in full, as it stands in reports
    side: int  # of the squares, in pixels
    weights_hash: str  # "" for weights that were never saved: their vectors are not cached
    vectors: Callable[[Tensor], Tensor]  # [B, 3, side, side] in [-1, 1] to [B, D]
    kind: str = "features"  # or "tokens" or "pixels"

    def distances(self, a_MD: Tensor, b_ND: Tensor) -> Tensor:
        """[M, N] in float64. Tokens: share of places that differ. Pixels: root mean square difference, of pictures in
        [0, 1]. Features: Euclidean distance of vectors scaled to unit length, 0 to 2."""
        if self.kind == "tokens":
            return torch.cdist(a_MD, b_ND, p=0).double() / a_MD.shape[1]
        a_MD, b_ND = (F.normalize(x.double()) if self.kind == "features" else x.double() for x in (a_MD, b_ND))
        distance_MN = torch.cdist(a_MD, b_ND, compute_mode="donot_use_mm_for_euclid_dist")  # 0 for equal vectors
        return distance_MN / (2 * math.sqrt(a_MD.shape[1])) if self.kind == "pixels" else distance_MN


def batches(pictures: Iterable[Image], side: int, device: torch.device) -> Iterator[Tensor]:
    """The largest centred squares of pictures, [B, 3, side, side]. Reads no more than a batch ahead."""
    stream = (to_tensor(fit_cover(picture, side, side)) for picture in pictures)
    while batch := list(islice(stream, BATCH)):
        yield torch.stack(batch).to(device)


@dataclass(frozen=True)
class Extractor:
    """Makes vectors of pictures, with a progress bar unless `quiet`."""

    device: torch.device
    quiet: bool = False

    @torch.inference_mode()
    def __call__(self, space: MetricSpace, pictures: Iterable[Image], count: int, key: str = "") -> Tensor:
        """[N, D] in float32 on the CPU. `count` is for the progress bar. Vectors of pictures with a `key`, which says
        what they are, are cached on disk, and those pictures are not read again."""
        name = hashlib.sha256(f"{space.name}/{space.side}/{space.weights_hash}/{key}".encode()).hexdigest()[:32]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igpt" / "features"
        path = folder / f"{name}.safetensors" if key and space.weights_hash else None
        with suppress(OSError, SafetensorError):
            if path:
                return load_file(path)["features"]
        title, quiet = space.name.partition(" (")[0], self.quiet or None
        stream = batches(pictures, space.side, self.device)
        rows = [space.vectors(x).float().cpu() for x in tqdm(stream, title, -(-count // BATCH), False, disable=quiet)]
        features_ND = torch.cat(rows) if rows else torch.zeros(0, 0)
        with suppress(OSError, SafetensorError):  # without a cache the next run extracts again, that is all
            if path:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as tmp:
                    save_file({"features": features_ND}, tmp)
        return features_ND


def nets(folder: str | None, model: Bundle) -> list[MetricSpace]:
    """The nets in `folder`, the main one first; without a folder the tokenizer of the model. Nothing is downloaded.
    Raises UserError where the folder holds none of the files, or damaged ones."""
    if folder is None:
        return [own_tokenizer(model)]
    builders = {Path(folder) / MOBILENET: mobilenet, Path(folder) / INCEPTION: inception}
    found = [build(file, model.device) for file, build in builders.items() if file.is_file()]
    if not found:
        raise UserError(f"the folder of feature nets {folder!r} has neither {MOBILENET} nor {INCEPTION}")
    return found


def own_tokenizer(model: Bundle) -> MetricSpace:
    """The model's own encoder: mean and standard deviation of every channel. A palette has none, so its features are
    the colours of 8x8 places. The numbers can be compared with those of no other model."""
    tokenizer = model.tokenizer

    def vectors(images_BCHW: Tensor) -> Tensor:
        if isinstance(tokenizer, VQTokenizer):
            return torch.cat(torch.std_mean(tokenizer.encoder(images_BCHW), (2, 3), correction=0), dim=1)
        return F.adaptive_avg_pool2d(images_BCHW, 8).flatten(1)

    width = 2 * tokenizer.config.channels[-1] if isinstance(tokenizer, VQTokenizer) else 192
    name = f"own tokenizer {width}-d (not to be compared with other models or papers)"
    return MetricSpace(name, model.grids.native_size[0], model.weights_hash, vectors)


def mobilenet(file: Path, device: torch.device) -> MetricSpace:
    """The pooled last features of Keras' MobileNetV2 1.0 (Sandler et al. 2018, arXiv 1801.04381), from safetensors."""
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2()
    digest = _load(net, file, device)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            # TensorFlow pads even sides on the right and at the bottom only, where torch pads all around.
            module.padding = (0, 0)
            module.register_forward_pre_hook(lambda _, inputs: F.pad(inputs[0], (0, 1, 0, 1)))
    return MetricSpace("MobileNetV2 1280-d", 224, digest, lambda x_BCHW: net.features(x_BCHW).mean((2, 3)))


def inception(file: Path, device: torch.device) -> MetricSpace:
    """The pooled block Mixed_6e of the Inception-v3 of 2015, on which the FID is defined (with 2048 later features)."""
    from torchvision.models import inception_v3

    layers = OrderedDict(inception_v3(init_weights=False, aux_logits=False).named_children())
    for name in ("Mixed_7b", "Mixed_7c", "avgpool", "dropout", "fc"):
        del layers[name]
    net = nn.Sequential(layers)
    digest = _load(net, file, device)
    del net.Mixed_7a  # the file has it, the 768 features come before it
    for name, module in net.named_modules():
        if name.endswith("branch_pool"):
            module.register_forward_pre_hook(lambda _, inputs: inside_averages(inputs[0]))
    return MetricSpace("Inception-v3-2015 Mixed_6e 768-d", 299, digest, lambda x_BCHW: net(x_BCHW).mean((2, 3)))


def inside_averages(averages_BCHW: Tensor) -> Tensor:
    """Turns torchvision's 3x3 averages into TensorFlow's, which count only the pixels inside the picture."""
    return averages_BCHW / F.avg_pool2d(torch.ones_like(averages_BCHW[:1, :1]), 3, stride=1, padding=1)


def _load(net: nn.Module, file: Path, device: torch.device) -> str:
    """Loads weights strictly, for inference. Returns their hash."""
    try:
        net.load_state_dict({name: weight.float() for name, weight in load_weights(file).items()}, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights {file} do not fit: {str(error).splitlines()[0]}") from error
    net.to(device).eval().requires_grad_(False)
    return hashlib.sha256(file.read_bytes()).hexdigest()
