# Makes the default root file system, $OUT/root.qcow2: Debian's static busybox under all its names,
# and the files beside this script, which were put in this folder.

mkdir tree
cd tree
mkdir bin dev etc mnt proc root run sbin sys tmp usr usr/bin usr/sbin var var/log var/tmp
chmod 700 root
chmod 1777 tmp var/tmp
ln -s ../run var/run

cp /bin/busybox bin/busybox
chmod 755 bin/busybox
bin/busybox --list-full | while read -r name; do
    case $name in
        */*) [ -e "$name" ] || ln -s /bin/busybox "$name" ;;
    esac
done

for name in fstab group hostname inittab passwd profile; do
    cp "../$name" "etc/$name"
    chmod 644 "etc/$name"
done
cp ../rc ../console etc/
chmod 755 etc/rc etc/console
cd ..

# Checksums of metadata and the background filling of inode tables cost time in the guest's kernel.
truncate --size 1G root.raw
mkfs.ext4 -q -F -d tree -L cowshed -m 0 -N 16384 -J size=4 \
    -O ^metadata_csum,^resize_inode -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 root.raw

# Everything belongs to root, whoever made it.
find tree -mindepth 1 -printf '/%P\n' | while read -r path; do
    printf 'set_inode_field "%s" uid 0\nset_inode_field "%s" gid 0\n' "$path" "$path"
done > owners
debugfs -w -f owners root.raw > /dev/null
e2fsck -fn root.raw

qemu-img convert -f raw -O qcow2 root.raw "$OUT/root.qcow2"
