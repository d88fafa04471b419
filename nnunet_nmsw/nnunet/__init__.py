"""Everything private of nnU-Net, batchgenerators and batchgeneratorsv2 that this package leans on, and why.

What is public is overridden and called where it belongs. Each piece here has a contract test in
`tests/test_nnunet_contract.py`, which says what has changed when a new nnU-Net breaks it.
"""
