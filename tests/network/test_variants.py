"""The table of variants holds what was published, and opens without PyTorch."""

import subprocess
import sys

import pytest

from coat_deploy.errors import UsageError
from coat_deploy.network.variants import VARIANTS, Published, get_variant

PUBLISHED = {  # params (M), GMACs, paper top-1, top-5, timm top-1, top-5, first 8 digits of SHA-256
    "coat_lite_tiny": (5.72, 1.60, 77.5, 93.8, 77.548, 93.924, "e88e96b0"),
    "coat_lite_mini": (11.01, 2.00, 79.1, 94.5, 79.104, 94.606, "6b4a8ae5"),
    "coat_lite_small": (19.84, 3.96, 81.9, 95.5, 82.304, 95.854, "8d362f48"),
    "coat_lite_medium": (44.57, 9.81, 83.6, 96.7, 83.602, 96.714, "a750cd63"),
    "coat_lite_medium_384": (44.57, 28.73, 84.5, 97.1, 84.890, 97.376, "f9129688"),
    "coat_tiny": (5.50, 4.35, 78.3, 94.0, 78.442, 94.044, "c6efc33c"),
    "coat_mini": (10.34, 6.82, 81.0, 95.2, 81.320, 95.388, "40667eec"),
    "coat_small": (21.69, 12.61, 82.1, 96.1, 82.378, 96.214, "7479cf9b"),
}


def published(name: str) -> Published:
    found = get_variant(name).published
    assert found is not None
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_those_of_the_papers_and_timms_tables(name: str) -> None:
    p = published(name)
    figures = (p.params_m, p.gmacs, p.paper_top1, p.paper_top5, p.top1, p.top5, p.sha8)
    assert figures == PUBLISHED[name]


def test_only_our_own_variants_are_unpublished() -> None:
    ours = {name for name, variant in VARIANTS.items() if variant.published is None}
    assert ours == {"coat_lite_nano", "coat_nano", "coat_toy", "coat_lite_toy"}
    assert set(VARIANTS) == ours | set(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("coat_small", "coat_small_7479cf9b.pth"),
        ("coat_lite_medium_384", "coat_lite_medium_384x384_f9129688.pth"),
    ],
)
def test_url_names_the_authors_file(name: str, file: str) -> None:
    assert published(name).url == f"https://vcl.ucsd.edu/coat/pretrained/{file}"


@pytest.mark.parametrize("name", VARIANTS)
def test_windows_share_out_all_heads_and_heads_all_channels(name: str) -> None:
    variant = get_variant(name)
    assert sum(heads for _, heads in variant.windows) == variant.num_heads
    assert all(channels % variant.num_heads == 0 for channels in variant.channels)


def test_classifier_reads_the_channels_of_scale_4() -> None:
    assert get_variant("coat_lite_small").num_features == 512
    assert get_variant("coat_small").num_features == 320


def test_only_the_384_model_has_another_input_size() -> None:
    sizes = {name: get_variant(name).input_size for name in PUBLISHED}
    assert sizes == dict.fromkeys(PUBLISHED, 224) | {"coat_lite_medium_384": 384}


def test_unknown_variant_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'coat_lite_tini'.*Did you mean 'coat_lite_tiny'\?"):
        get_variant("coat_lite_tini")


def test_unknown_variant_like_nothing_lists_what_is_known() -> None:
    with pytest.raises(UsageError, match="known: coat_lite_tiny, .*coat_small") as caught:
        get_variant("resnet50")
    assert "Did you mean" not in str(caught.value)


def test_the_table_opens_without_pytorch() -> None:
    code = "import sys, coat_deploy.network.variants; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
