"""Which images and captions of a split belong together."""


class Groups:
    """Equal consecutive groups of a split's images and captions, as many as the shorter side is long.

    Without captions each image is a group.
    """

    def __init__(self, n_images, n_captions):
        self.n_images, self.n_captions = n_images, n_captions
        self.n = min(n_images, n_captions or n_images)

    def __len__(self):
        return self.n

    def of_image(self, image):
        return image * self.n // self.n_images

    def of_caption(self, caption):
        return caption * self.n // self.n_captions

    def images(self, group):
        """Indices of a group's images."""
        return self._members(group, self.n_images)

    def captions(self, group):
        """Indices of a group's captions."""
        return self._members(group, self.n_captions)

    def _members(self, group, count):
        return list(range(group * count // self.n, (group + 1) * count // self.n))
