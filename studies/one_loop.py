"""Gates and codes learned at once by Eq. 3 with a constant α, blind to how often subgoals change.

    python -m studies.one_loop --base runs/gridworld-quick-s0 [--alpha 0.012]

Three changes to the first part of stage 4: a code is inferred from where the next gate opens, by Eq. 2 run
backwards; it is decoded in a mirror image from the first step on; α rests. The second part and internal RL
follow as usual. The base is a finished run; settings of internal_rl.py may follow, those of the base. On
single colours it works, on pairs and on the ant nothing takes off. Only scores know hidden truth.
"""
import argparse
from pathlib import Path

import internal_rl as rl
from studies.rivals import again, finished

def main(arguments=None):
    parser = argparse.ArgumentParser("studies.one_loop", allow_abbrev=False)
    parser.add_argument("--base", default="runs/gridworld-quick-s0", type=finished, help="a finished run")
    parser.add_argument("--out", default="runs/one-loop-s0", type=Path, help="folder of this study")
    parser.add_argument("--alpha", type=float, default=0.012, help="weight of the KL")
    study, settings = parser.parse_known_args(arguments)
    plain = rl.discovery_loss

    def in_the_mirror(config, base, meta, batch, image, rng):
        return plain(config, base, meta, batch, rl.mirrored(config, batch, rng), rng)

    return again(study.base, "pretrain", study.out, [*settings, "--stage", "rl"],
                 discovery_loss=in_the_mirror, TrajectoryEncoder=rl.SegmentEndEncoder,
                 follow_rate=lambda alpha, *_: alpha.fill_(study.alpha))

if __name__ == "__main__":
    main()
