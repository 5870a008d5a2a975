/* A program that is linked with libmshare and looks for a region: `attacher NAME`. */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include <mshare.h>

int main(int argc, char **argv)
{
	struct mshare_info info;

	if (argc < 2 || mshare_attach(argv[1], O_RDWR, &info) < 0) {
		fprintf(stderr, "attach: %s\n", strerror(errno));
		return 2;
	}
	return 0;
}
