"""Make nnU-Net find the trainers of this package: append `plugin/` to the variable `nnUNet_extTrainer`.

The file `nnunet_nmsw_plugin.pth` of the installed package imports this module whenever Python starts, hence only `os`
is used. A folder that the user has put into the variable stays there, before ours.
"""

import os

PLUGIN_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plugin")
VARIABLE = "nnUNet_extTrainer"


def register(trainers: str = PLUGIN_FOLDER) -> None:
    """Append a folder of trainers to `nnUNet_extTrainer` of this process, once."""
    folders = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]
    if trainers not in folders:
        os.environ[VARIABLE] = os.pathsep.join([*folders, trainers])


register()
