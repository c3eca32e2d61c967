"""A picture strip: frames of a video, evenly spread, side by side.

python -m benchmark.video_strip runs/RUN/videos/5996544.mp4 --output benchmark/results/walk.png [--until 4]
"""

import dataclasses

import imageio.v3 as iio
import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """Lay frames of a video side by side."""

    video: tyro.conf.Positional[str]  # what --capture-video wrote
    output: str  # the image to write
    frames: int = 5
    until: float | None = None  # seconds from the video's start that are shown; default: all
    width: int = 240  # pixels that are kept of each frame, from its middle


def main() -> None:
    """Write the strip."""
    options = tyro.cli(Options)
    frames = iio.imread(options.video)
    if options.until:
        frames = frames[: round(options.until * iio.immeta(options.video)["fps"])]
    chosen = frames[np.linspace(0, len(frames) - 1, options.frames).round().astype(int)]
    left = (chosen.shape[2] - options.width) // 2
    kept = chosen[:, :, max(left, 0) : left + options.width]
    iio.imwrite(options.output, np.concatenate(list(kept), axis=1))


if __name__ == "__main__":
    main()
