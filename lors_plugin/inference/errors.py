"""The error of inputs that the user can repair."""


class InferenceError(ValueError):
    """A model, an image or an option that no prediction can be made with."""
