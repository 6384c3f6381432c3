"""A model cut into stages, for strategies that send activations from one to the next.

recording   what a forward pass calls, in order, and what goes from call to call
cutting     where to cut: what crosses each border, what each stage takes
running     stages at work in a schedule of torch.distributed.pipelining
"""
