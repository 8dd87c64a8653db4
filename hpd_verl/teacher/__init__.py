"""The teacher: features of its distribution a token, from its model or from a store of them."""
