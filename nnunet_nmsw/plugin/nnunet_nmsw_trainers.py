"""What nnU-Net's search for trainers imports, and then forgets: the classes live in `nnunet_nmsw.trainers`."""

from nnunet_nmsw.trainers import *
