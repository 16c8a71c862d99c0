from utils.command import guarded
from utils.export.command import main

guarded(main)
