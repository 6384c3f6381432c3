"""Ranks that train by themselves and are averaged now and then: local SGD.

    fragments   the weights, averaged at once or in parts, at once or while ranks train
    beside      what belongs to them: buffers, and the state of the ranks' optimizers
    tally       what ranks have to tell each other of the steps since they met

Which fragment's turn it is, the strategy says.
"""
