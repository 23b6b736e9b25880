from .convert import open_dataset
