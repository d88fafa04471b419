"""A volume: its windows, its low-resolution view, its labels, and the ways between them."""
