"""The playground: a page that shows what models compute and how runs learn, and its server."""
