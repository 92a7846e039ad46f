/* Mount a folder with the latency of a network file system.

   cc -O2 -o slow_file_system slow_file_system.c $(pkg-config --cflags --libs fuse3)
   ./slow_file_system FOLDER MOUNTPOINT --lookup_us 500 --read_us 1000 --mb_per_s 250

   Every lookup, open, creation and removal takes lookup_us longer. Every read and write takes read_us longer, and its
   bytes at mb_per_s. With --errno N --from A --to B, each read of a byte from A to B of any file fails with that errno.
   While the file named by --stall exists, every read waits. Ends with fusermount3 -u MOUNTPOINT, and then prints the
   numbers of reads, bytes read and lookups as JSON. */
#define FUSE_USE_VERSION 35
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse.h>
#include <limits.h>
#include <stddef.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

static struct { int lookup_us, read_us, mb_per_s, error; unsigned long from, to; char *stall; } o = {.mb_per_s = 1000};
static int base; /* descriptor of the folder: all paths are relative to it */
static atomic_long num_reads, bytes_read, num_lookups;

static const struct fuse_opt options[] = {
    {"--lookup_us %i", offsetof(__typeof__(o), lookup_us), 0}, {"--read_us %i", offsetof(__typeof__(o), read_us), 0},
    {"--mb_per_s %i", offsetof(__typeof__(o), mb_per_s), 0},   {"--errno %i", offsetof(__typeof__(o), error), 0},
    {"--from %lu", offsetof(__typeof__(o), from), 0},          {"--to %lu", offsetof(__typeof__(o), to), 0},
    {"--stall %s", offsetof(__typeof__(o), stall), 0},         FUSE_OPT_END};

static void pause_us(double us) {
    struct timespec time = {us / 1e6, (long)(us * 1e3) % 1000000000};
    nanosleep(&time, NULL);
}

static const char *lookup(const char *path) {
    num_lookups++;
    pause_us(o.lookup_us);
    return path[1] ? path + 1 : ".";
}

static int result(long value) { return value < 0 ? -errno : 0; }

static void transfer(long num_bytes) { pause_us(o.read_us + (double)num_bytes / o.mb_per_s); }

static int fs_getattr(const char *path, struct stat *status, struct fuse_file_info *file) {
    return result(fstatat(base, lookup(path), status, AT_SYMLINK_NOFOLLOW));
}

static int fs_readlink(const char *path, char *text, size_t size) {
    ssize_t length = readlinkat(base, lookup(path), text, size - 1);
    if (length >= 0) text[length] = 0;
    return result(length);
}

static int fs_readdir(const char *path, void *list, fuse_fill_dir_t add, off_t offset, struct fuse_file_info *file,
                      enum fuse_readdir_flags flags) {
    int folder = openat(base, lookup(path), O_RDONLY | O_DIRECTORY);
    DIR *entries = folder < 0 ? NULL : fdopendir(folder);
    if (!entries) return -errno;
    for (struct dirent *entry; (entry = readdir(entries));) {
        struct stat status = {.st_ino = entry->d_ino, .st_mode = DTTOIF(entry->d_type)};
        add(list, entry->d_name, &status, 0, 0);
    }
    return result(closedir(entries));
}

static int fs_create(const char *path, mode_t mode, struct fuse_file_info *file) {
    file->fh = openat(base, lookup(path), file->flags | (mode ? O_CREAT : 0), mode);
    return result((int)file->fh);
}

static int fs_open(const char *path, struct fuse_file_info *file) { return fs_create(path, 0, file); }

static int fs_read(const char *path, char *bytes, size_t size, off_t offset, struct fuse_file_info *file) {
    while (o.stall && !access(o.stall, F_OK)) pause_us(10000);
    num_reads++;
    ssize_t count = pread(file->fh, bytes, size, offset);
    if (count > 0) bytes_read += count;
    transfer(count);
    if (o.error && (unsigned long)offset < o.to && offset + size > o.from) return -o.error;
    return count < 0 ? -errno : count;
}

static int fs_write(const char *path, const char *bytes, size_t size, off_t offset, struct fuse_file_info *file) {
    ssize_t count = pwrite(file->fh, bytes, size, offset);
    transfer(count);
    return count < 0 ? -errno : count;
}

static int fs_fsync(const char *path, int only_data, struct fuse_file_info *file) { return result(fsync(file->fh)); }
static int fs_release(const char *path, struct fuse_file_info *file) { return result(close(file->fh)); }
static int fs_unlink(const char *path) { return result(unlinkat(base, lookup(path), 0)); }
static int fs_rmdir(const char *path) { return result(unlinkat(base, lookup(path), AT_REMOVEDIR)); }
static int fs_mkdir(const char *path, mode_t mode) { return result(mkdirat(base, lookup(path), mode)); }

static int fs_rename(const char *from, const char *to, unsigned flags) {
    return result(renameat2(base, lookup(from), base, lookup(to), flags));
}

static int fs_truncate(const char *path, off_t size, struct fuse_file_info *file) {
    if (file) return result(ftruncate(file->fh, size));
    int opened = openat(base, lookup(path), O_WRONLY);
    if (opened < 0) return -errno;
    int failed = ftruncate(opened, size) ? -errno : 0;
    close(opened);
    return failed;
}

static int fs_statfs(const char *path, struct statvfs *status) { return result(fstatvfs(base, status)); }

static void *fs_init(struct fuse_conn_info *connection, struct fuse_config *config) {
    connection->max_background = 256; /* the default, 12, would hide how many reads a client keeps in flight */
    connection->congestion_threshold = 256;
    config->attr_timeout = config->entry_timeout = 1;
    return NULL;
}

static const struct fuse_operations operations = {
    .init = fs_init, .getattr = fs_getattr, .readlink = fs_readlink, .readdir = fs_readdir, .create = fs_create,
    .open = fs_open, .read = fs_read, .write = fs_write, .fsync = fs_fsync, .release = fs_release, .unlink = fs_unlink,
    .rmdir = fs_rmdir, .mkdir = fs_mkdir, .rename = fs_rename, .truncate = fs_truncate, .statfs = fs_statfs};

int main(int argc, char **argv) {
    if (argc < 3 || (base = open(argv[1], O_RDONLY | O_DIRECTORY)) < 0) {
        fprintf(stderr, "usage: %s FOLDER MOUNTPOINT [options]; see the head of the source\n", argv[0]);
        return 2;
    }
    argv[1] = argv[0];
    struct fuse_args arguments = FUSE_ARGS_INIT(argc - 1, argv + 1);
    if (fuse_opt_parse(&arguments, &o, options, NULL) || fuse_opt_add_arg(&arguments, "-f") ||
        fuse_opt_add_arg(&arguments, "-omax_threads=256,max_idle_threads=256"))
        return 2;
    int status = fuse_main(arguments.argc, arguments.argv, &operations, NULL);
    printf("{\"reads\": %ld, \"bytes\": %ld, \"lookups\": %ld}\n", num_reads, bytes_read, num_lookups);
    return status;
}
