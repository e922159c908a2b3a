"""Pictures to feature vectors: a pretrained net from a folder, or the model's own tokenizer.

A net is named in full wherever its numbers appear: a distance on 1280 features of MobileNetV2 is no "FID". torchvision
takes 2.5 s to import, so only functions import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

from igpt.bundle import Bundle
from tokenizer_vq.base import complaint
from tokenizer_vq.images import fit_cover, to_tensor
from tokenizer_vq.vq import VQTokenizer

from .perceptual import load_weights

MOBILENET = "mobilenet_v2.safetensors"
BATCH = 8  # pictures in memory at once: LPIPS takes 50 MB for each


def batches(pictures: Iterable[Image], side: int, device: torch.device) -> Iterator[Tensor]:
    """The largest centred squares of pictures, [B, 3, side, side]. Reads no more than a batch ahead."""
    stream = (to_tensor(fit_cover(picture, side, side)) for picture in pictures)
    while batch := list(islice(stream, BATCH)):
        yield torch.stack(batch).to(device)


@dataclass(frozen=True)
class MetricSpace:
    """Squares of pictures as vectors, and distances between these."""

    name: str  # in full, as it stands in reports
    side: int  # of the squares, in pixels
    device: torch.device
    vectors: Callable[[Tensor], Tensor]  # [B, 3, side, side] in [-1, 1] to [B, D]
    kind: str = "features"  # or "pixels"

    @torch.inference_mode()
    def extract(self, pictures: Iterable[Image], count: int, quiet: bool = False) -> Tensor:
        """The vectors of `count` pictures, [N, D] in float32 on the CPU, with a progress bar unless `quiet`."""
        title, stream = self.name.partition(" (")[0], batches(pictures, self.side, self.device)
        progress = tqdm(stream, title, -(-count // BATCH), leave=False, disable=quiet or None)
        rows = [self.vectors(images_BCHW).float().cpu() for images_BCHW in progress]
        return torch.cat(rows) if rows else torch.zeros(0, 0)

    def distances(self, a_MD: Tensor, b_ND: Tensor) -> Tensor:
        """[M, N] in float64. Pixels: root mean square difference, of pictures in [0, 1]. Features: Euclidean distance
        of vectors scaled to unit length, 0 to 2."""
        a_MD, b_ND = (F.normalize(x.double()) if self.kind == "features" else x.double() for x in (a_MD, b_ND))
        distance_MN = torch.cdist(a_MD, b_ND, compute_mode="donot_use_mm_for_euclid_dist")  # 0 for equal vectors
        return distance_MN / (2 * math.sqrt(a_MD.shape[1])) if self.kind == "pixels" else distance_MN


def feature_space(folder: str | None, model: Bundle) -> MetricSpace:
    """The net in `folder`; without a folder the tokenizer of the model. Nothing is downloaded."""
    return own_tokenizer(model) if folder is None else mobilenet(Path(folder) / MOBILENET, model.device)


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
    return MetricSpace(name, model.grids.native_size[0], model.device, vectors)


def mobilenet(file: Path, device: torch.device) -> MetricSpace:
    """The pooled last features of Keras' MobileNetV2 1.0 (Sandler et al. 2018, arXiv 1801.04381), from safetensors.
    Raises UserError where there are none or they are damaged."""
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2()
    with complaint(f"the weights {file} do not fit", RuntimeError):
        net.load_state_dict(load_weights(file), strict=True)
    net.to(device).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            # TensorFlow pads even sides on the right and at the bottom only, where torch pads all around.
            module.padding = (0, 0)
            module.register_forward_pre_hook(lambda _, inputs: F.pad(inputs[0], (0, 1, 0, 1)))
    return MetricSpace("MobileNetV2 1280-d", 224, device, lambda x_BCHW: net.features(x_BCHW).mean((2, 3)))
