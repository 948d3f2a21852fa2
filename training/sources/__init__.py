"""Where rows come from: REFER folders, people's own annotations, masks and images, layouts found on the Hub, drawn scenes.

A row is one referred object with its image, mask and sentences. May import `support`.
"""
