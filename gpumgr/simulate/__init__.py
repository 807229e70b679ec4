"""The order on virtual time: the very decisions of core/queue.py and its policies, over hours that take seconds."""
