"""InversePRM with every last transition dropped.

Paper: none. That an episode ended by itself tells of success, although InversePRM is to learn from
    demonstrations alone; this run hides it (P1's InversePRM: SFT 63.4 -> 82.8 -> 86.6 %).
Changes `prm_loss`: no last action, of the expert or of a learner, makes a transition.
Command: python train.py --algo inverseprm --ablation hidden_ends
Ours: not measured yet.
"""

from functools import partial

from fast_alfworld.cli import UserError
import train


def check(args):
    if args.algo != "inverseprm":
        raise UserError("--ablation hidden_ends: needs --algo inverseprm")


prm_loss = partial(train.prm_loss, hide_ends=True)
