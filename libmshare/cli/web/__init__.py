"""`mshare web`: a page that shows what is, in a browser of this machine."""
