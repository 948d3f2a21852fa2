"""Where rows come from: REFER folders, masks and images of annotations, layouts found on the Hub, drawn scenes.

A row is one referred object with its image, mask and sentences. May import `support`.
"""
