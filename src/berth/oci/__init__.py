"""Images: documents, archives, layers and the store, by the OCI specifications. Layer 2; `images` is the API of it.

spec, digest, choose            the documents; the names of blobs; the one image for a platform
store                           the image store, an OCI image layout
stream, tar, tarwriter          bytes and archives
layer, tree, unpack             layers to a directory, whatever they hold
diff, hostile, derive           a directory's changes to a layer and an image; the check of a guest's layer
fetch                           an image by its reference: from `registry`, or by one of
sources, archive, rootfs        layouts and archives, root file systems
bootstrap, aptsources           a distribution's package mirror
save, built                     out into an archive; what buildah has built
"""
