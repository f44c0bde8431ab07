"""Reward functions of Worlds W and T, as a user writes them for `--reward FILE.py:NAME`; for
responses that stop, whose text is that of their ids, as in helpers/worlds.py."""

import math


def w(row, response):
    """log 3 for a response that begins with the prompt's last token, else 0."""
    return math.log(3) * (response.split()[:1] == row["instruction"].split()[-1:])


def t(row, response):
    """1 for two or more of the prompt's last token, 0.5 for one, 0 for none; minus 0.1 a token."""
    wanted, tokens = row["instruction"].split()[-1], response.split()
    return min(tokens.count(wanted), 2) / 2 - 0.1 * len(tokens)
