"""Layers whose weights are divided over ranks: what split-weights and hybrid are made of.

border      how activations come to a split layer and go from it
observe     in which order layers are called, and what lies between them
linear      columns and rows of fully connected layers
embedding   rows of tables
attention   heads
logits      the loss over a softmax whose classes are divided
divide      replacing a model's layers by split ones
halo        which rows of an image each rank has and needs
borrow      rows of an image on their way between ranks
chain       the layers of a model that can work on strips of an image
strips      ... at work on them
plan        the model, tried on a few samples before it is divided
"""
