"""What every command uses: messages about errors, files, locks, folders and Hub ids, child processes, the environment.

Nothing here knows images, models or training. Modules here import no other room of `training`.
"""
