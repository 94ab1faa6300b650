/* stopwatch WORD COMMAND...: the microseconds from COMMAND's exec until it has written WORD to its
   standard output; then COMMAND is killed. */
#define _GNU_SOURCE
#include <err.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000 + time.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
	static char said[1 << 20];
	size_t length = 0;
	int master, slave, out[2];
	/* Some VMMs insist on a terminal; all get one for input. */
	if (argc < 3 || openpty(&master, &slave, NULL, NULL, NULL) < 0 || pipe(out) < 0)
		err(2, "stopwatch");
	long begin = now();
	pid_t pid = fork();
	if (pid == 0) {
		dup2(slave, 0);
		dup2(out[1], 1);
		close(out[0]);
		execvp(argv[2], argv + 2);
		err(2, "%s", argv[2]);
	}
	close(out[1]);
	while (!memmem(said, length, argv[1], strlen(argv[1]))) {
		ssize_t count = read(out[0], said + length, sizeof said - length);
		if (count <= 0) {
			write(2, said, length);
			errx(1, "it did not say '%s'", argv[1]);
		}
		length += count;
	}
	printf("%ld\n", now() - begin);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}
