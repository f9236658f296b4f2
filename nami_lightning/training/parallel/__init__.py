"""What several ranks do together.

- ``first_weights``: rank 0 makes the first weights of a network, and the others receive theirs.
- ``token_groups``: context parallelism: the ranks of a group share the tokens of each sample.
"""
