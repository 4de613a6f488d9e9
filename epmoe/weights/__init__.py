"""The load pass: a checkpoint's files to a model with this rank's experts."""
