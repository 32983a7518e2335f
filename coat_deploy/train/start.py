"""What a training begins with: the spec of the model to be, and its weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coat_deploy.errors import UsageError, WeightsError
from coat_deploy.model import Model
from coat_deploy.network.coat import CoaT, create_network
from coat_deploy.network.keys import is_head
from coat_deploy.network.variants import get_variant
from coat_deploy.network.weights import WeightsOptions, load_checkpoint
from coat_deploy.repository import Repository, published_configs, read_labels
from coat_deploy.spec import ModelSpec, Preprocess
from coat_deploy.train.recipe import Recipe

_log = logging.getLogger(__name__)

SCRATCH = "scratch"
PUBLISHED = ("timm", "official")


def plan_spec(
    variant_name: str,
    labels: Sequence[str],
    recipe: Recipe,
    base: Preprocess | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """Return the spec of a model to be trained; `base` is the preprocessing it takes over.

    Raises: UsageError for an unknown variant, or images too small for it.
    """
    variant = get_variant(variant_name)
    side = recipe.size or variant.input_size
    for what, wanted in (("size", side), ("train_size", recipe.train_size or side)):
        if wanted < variant.min_side:
            raise UsageError(
                f"{what}: too small for {variant.name} (got {wanted}, expected at least "
                f"{variant.min_side}). Choose a larger one."
            )
    how = replace(
        base or Preprocess((side, side)), input_size=(side, side), crop_pct=recipe.crop_pct
    )
    return ModelSpec(
        architecture=variant.name,
        num_classes=len(labels),
        num_features=variant.num_features,
        preprocess=how,
        label_names=tuple(labels),
        model_args=dict(model_args or {}),
        timm=variant.timm,
    )


def find_base(init: str, variant_name: str, repository: Repository) -> Model | None:
    """Return the model that `init` names, None for scratch or a bare file of weights.

    Published weights come with their own labels and preprocessing, whatever a model of the user's
    by the variant's name has.
    Raises: UsageError for a name that is neither, or a variant that nobody published weights of.
    """
    if init == SCRATCH or Path(init).is_file():
        return None
    if init not in PUBLISHED:
        return repository.find(init)
    if get_variant(variant_name).published is None:
        raise UsageError(
            f"init '{init}': nobody published weights of {variant_name}. Begin from {SCRATCH}, or "
            "with a model or file of your own."
        )
    return Repository((published_configs(),)).find(variant_name)


def begin(spec: ModelSpec, recipe: Recipe, base: Model | None) -> CoaT:
    """Return the network with the weights that the recipe begins with.

    What is drawn depends on the seed alone. From other weights all but the classifier is taken;
    the classifier too where `base` is of the same classes in the same order.
    Raises: WeightsError for weights that do not fit; DownloadError.
    """
    torch.manual_seed(recipe.seed)
    network = create_network(
        spec.architecture,
        spec.num_classes,
        **spec.model_args,
        drop_path=recipe.drop_path,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    if recipe.init == SCRATCH:
        return network
    source = recipe.init
    if base is not None and source not in PUBLISHED:
        _check_base(base, spec)
        source = str(base.weights_path)
    keep_head = base is not None and read_labels(base.spec) == spec.label_names
    fresh = {key: value for key, value in network.state_dict().items() if is_head(key)}
    checkpoint = load_checkpoint(source, spec, WeightsOptions(replace_head=not keep_head))
    state = {key: torch.from_numpy(value) for key, value in checkpoint.tensors.items()}
    network.load_state_dict(state | ({} if keep_head else fresh))
    return network


def _check_base(base: Model, spec: ModelSpec) -> None:
    """Refuse weights of another network, which might fit by their shapes. Raises WeightsError."""
    for what, got, expected in (
        ("architecture", base.spec.architecture, spec.architecture),
        ("model_args", dict(base.spec.model_args), dict(spec.model_args)),
    ):
        if got != expected:
            raise WeightsError(
                f"{base.folder}: is another network ({what}: got {got}, expected {expected}). "
                "Train that one, or begin with other weights."
            )
    if not base.weights_path.is_file():
        raise WeightsError(
            f"{base.folder}: holds no weights. Begin with {' or '.join(PUBLISHED)}, or another "
            "model."
        )
