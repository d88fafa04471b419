"""A demonstration that needs no data: a generated phantom through nnU-Net's own commands and NMSW's."""
