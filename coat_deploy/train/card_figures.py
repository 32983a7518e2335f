"""How a model card writes figures."""

from coat_deploy.measure.accuracy import Share


def images(number: int) -> str:
    """Return a count of images: "1 image", "341 images"."""
    return f"{number} image{'' if number == 1 else 's'}"


def count(number: int) -> str:
    """Return three digits and a unit: 914 K, 0.91 M, 4.35 G."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if number >= size * 0.1:
            return f"{number / size:.3g} {unit}"
    return str(number)


def percent(share: float) -> str:
    """Return a share as per cent; one short of all is never rounded up to it."""
    text = f"{share:.1%}"
    return ">99.9%" if share < 1 and text == "100.0%" else text


def cells(share: Share) -> tuple[str, str]:
    """Return a share and its 95% interval."""
    return percent(share.value), f"{share.low:.1%} to {share.high:.1%}"


def with_interval(share: Share) -> str:
    """Return a share, its 95% interval in brackets."""
    value, interval = cells(share)
    return f"{value} ({interval})"


def duration(seconds: float) -> str:
    """Return a time to the minute: "45 s", "17 min", "3 h 12 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
