"""Pictures to feature vectors: pretrained nets from a folder, or the model's own tokenizer.

A net is named in full wherever its numbers appear: a distance on 1280 features of MobileNetV2 is no "FID". Vectors of
a collection are kept on disk for the next time. torchvision takes 2.5 s to import, so only functions import it.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
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

MOBILENET = "mobilenet_v2.safetensors"
INCEPTION = "inception_v3_2015_trunk_fp16.safetensors"
BATCH = 16


@dataclass(frozen=True)
class MetricSpace:
    """Squares of pictures as vectors, and distances between these."""

    name: str  # in full, as it stands in reports
    side: int  # of the squares, in pixels
    weights_hash: str
    vectors: Callable[[Tensor], Tensor]  # [B, 3, side, side] in [-1, 1] to [B, D]
    kind: str = "features"  # or "tokens" or "pixels"

    def scaled(self, x_ND: Tensor) -> Tensor:
        """What `distances` compares."""
        if self.kind == "tokens":
            return x_ND
        return x_ND.double() / (2 * math.sqrt(x_ND.shape[1])) if self.kind == "pixels" else F.normalize(x_ND.double())

    def distances(self, a_MD: Tensor, b_ND: Tensor) -> Tensor:
        """[M, N]. Tokens: share of places that differ. Pixels: root mean square difference, pictures in [0, 1].
        Features: the Euclidean distance of vectors brought to unit length, 0 to 2."""
        if self.kind == "tokens":
            return torch.cdist(a_MD, b_ND, p=0).double() / a_MD.shape[1]
        return torch.cdist(a_MD, b_ND, compute_mode="donot_use_mm_for_euclid_dist")


# Nets


def nets(folder: str | None, model: Bundle) -> list[MetricSpace]:
    """The nets in `folder`, the main one first; without a folder the tokenizer of the model. Nothing is downloaded.

    Raises UserError where the folder holds none of the files, or damaged ones.
    """
    if folder is None:
        return [own_tokenizer(model)]
    kinds = {Path(folder) / MOBILENET: mobilenet, Path(folder) / INCEPTION: inception}
    found = [build(file, model.device) for file, build in kinds.items() if file.is_file()]
    if not found:
        raise UserError(f"the folder of feature nets {folder!r} has neither {MOBILENET} nor {INCEPTION}")
    return found


def own_tokenizer(model: Bundle) -> MetricSpace:
    """The model's own encoder, pooled: mean and spread of every channel. (A palette has only colours, on 8x8 places.)

    It sees what this model sees, so its numbers can be compared with nobody else's.
    """
    tokenizer = model.tokenizer

    def vectors(images_BCHW: Tensor) -> Tensor:
        if not isinstance(tokenizer, VQTokenizer):
            return F.adaptive_avg_pool2d(images_BCHW, 8).flatten(1)
        encoded = tokenizer.encoder(images_BCHW)
        return torch.cat([encoded.mean((2, 3)), encoded.std((2, 3), correction=0)], dim=1)

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
    ones = averages_BCHW.new_ones(1, 1, *averages_BCHW.shape[2:])
    return averages_BCHW / F.avg_pool2d(ones, 3, stride=1, padding=1)


def _load(net: nn.Module, file: Path, device: torch.device) -> str:
    """Load weights (stored in any precision) strictly, for use only; their hash."""
    try:
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in load_file(file).items()}
        net.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"the feature net {file} cannot be read: {str(error).splitlines()[0]}") from error
    net.to(device).eval().requires_grad_(False)
    return hashlib.sha256(file.read_bytes()).hexdigest()


# Extraction


def cache_folder() -> Path:
    """Where features are kept: igpt/features in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igpt" / "features"


@dataclass(frozen=True)
class Extractor:
    """Makes vectors of pictures, with a progress line where somebody is watching."""

    device: torch.device
    quiet: bool = False

    @torch.inference_mode()
    def __call__(
        self, space: MetricSpace, pictures: Iterable[Image], count: int, what: str = "pictures", key: str = ""
    ) -> Tensor:
        """[count, D] in float32 on the CPU, of the largest centred squares of `count` pictures.

        `pictures` is gone through once, a small batch at a time, and no further than it must; not at all where vectors
        were kept under the same `key`, which says what the pictures are. Without one, or a hash of weights, none are.
        """
        name = hashlib.sha256(f"{space.name}/{space.side}/{space.weights_hash}/{key}".encode()).hexdigest()[:32]
        path, keep = cache_folder() / f"{name}.safetensors", bool(key and space.weights_hash)
        with suppress(OSError, SafetensorError, KeyError):
            if keep:
                return load_file(path)["features"]
        stream, rows, title = iter(pictures), [], f"{space.name.split(' (')[0]}: {what}"
        for first in tqdm(range(0, count, BATCH), desc=title, disable=self.quiet or None, leave=False):
            squares = [fit_cover(x, space.side, space.side) for x in islice(stream, min(BATCH, count - first))]
            images_BCHW = torch.stack([to_tensor(square) for square in squares]).to(self.device)
            rows.append(space.vectors(images_BCHW).float().cpu())
        features_ND = torch.cat(rows) if rows else torch.zeros(0, 0)
        try:
            if keep:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as tmp:
                    save_file({"features": features_ND}, tmp)
        except (OSError, SafetensorError) as error:  # the next run has to extract again, that is all
            print(f"igpt: features are not kept for next time: {error}", file=sys.stderr)
        return features_ND
