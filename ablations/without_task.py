"""One task type is left out of all that is learned from.

Paper (P1, named among its checks): a held-out task type; no number.
Changes `games`: the train and dev games have no game of the type. The test splits have them;
    result.json gives their success by task type.
Command: python train.py --ablation without_task --without pick_heat_then_place_in_recep
Ours: not measured yet.
"""

from fast_alfworld import TASK_TYPES


def flags(parser):
    parser.add_argument_group("--ablation without_task").add_argument(
        "--without", choices=TASK_TYPES, default="pick_heat_then_place_in_recep",
        help="the task type")


def games(args, some):
    """-> [Game]"""
    return [game for game in some if game.task_type != args.without]
