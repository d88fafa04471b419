"""Networks of other libraries in the form that nnU-Net's plans ask for."""
