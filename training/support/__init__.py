"""What every command uses: the command line's errors, files written whole, child processes, the environment.

Nothing here knows of images, models or training. It may import the standard library and `huggingface_hub` alone.
"""
