"""A task without a configuration of its own, and so without a time limit: `endless_task:Endless`."""

import own_tasks


class Endless(own_tasks.Point):
    """Made without arguments."""

    def __init__(self):
        super().__init__()
